"""Which base model to serve: the `model` setting → a local directory, described; and which weights to load for it."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

from adapters import prequantized
from adapters.base import BaseModel
from adapters.demo_base import NAME as DEMO_NAME
from adapters.demo_base import prepare_demo_base
from adapters.errors import AdapterError
from server.errors import SettingsError
from server.settings import Settings

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def find_base(settings: Settings) -> BaseModel:
    """Describe the base. Raises SettingsError for one that cannot be served. May take a minute (demo or large base)."""
    path = _directory(settings)
    name = settings.served_model_name or (DEMO_NAME if settings.model == "demo" else path.name)
    try:
        return BaseModel.read(path, name=name, cache_dir=settings.data_dir / "fingerprints")
    except AdapterError as error:
        raise SettingsError(f"model is {settings.model!r}: {error}") from None


def weights_of(settings: Settings, base: BaseModel) -> Path:
    """The directory that the engine loads: the base in NF4 where it can be kept so, made now if need be, else the base.

    Minutes for a large base, once. A disk that is full costs the time it would have saved, not the start.
    """
    if not _can_be_kept(settings, base):
        return base.path
    place = prequantized.place(base, settings.data_dir / "quantized")
    if not prequantized.is_there(place):
        log.info("keeping the base in NF4, once", extra={"path": str(place)})
        arguments = (base.path, place, settings.data_dir / "fingerprints")
        command = [sys.executable, "-m", "adapters.prequantized", *map(str, arguments)]
        errors = None if sys.stderr.isatty() else subprocess.PIPE  # its progress bar is for a terminal
        made = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True, check=False
        )
        if made.returncode:
            reason = (made.stdout + (made.stderr or "")).strip()[-500:]
            log.warning("the base in NF4 cannot be kept", extra={"reason": reason})
            return base.path
    return place


def _can_be_kept(settings: Settings, base: BaseModel) -> bool:
    if settings.quantization != "nf4" or not settings.cache_quantized:
        return False
    if settings.is_distributed:
        return False  # vLLM does not split a model over devices that is quantised already
    return prequantized.can_be_prequantized(base)


def _directory(settings: Settings) -> Path:
    if settings.model == "demo":
        return prepare_demo_base(settings.data_dir / "base" / DEMO_NAME)
    local = Path(settings.model).expanduser()
    if (local / "config.json").exists():
        return local.absolute()
    if local.exists() or not HUB_ID.fullmatch(settings.model):
        raise SettingsError(
            f"model is {settings.model!r}: no directory with a config.json there, and not a hub id (org/name) either"
        )
    return _from_hub(settings.model)


def _from_hub(model_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model_id, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise SettingsError(
            f"model {model_id!r} could not be fetched from the hub: {reason}; check the name and the connection, "
            "or give a local directory"
        ) from None
