"""What the process of a fine-tuning job reads: configuration, data and adapter in a directory of the job's own, as they
were at its first attempt, whatever becomes of the files meanwhile. It knows no jobs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapters.base import BaseModel
from adapters.errors import ConfigError
from adapters.file_store import DataFile, FileStore
from adapters.peft_config import read_config
from adapters.upload import CONFIG
from server.data_files import data_path, link_data, require_data
from server.fine_tuning_fields import OWN_KEYS, JobFields, Resolved, configuration, resolve
from server.settings import Settings

ADAPTER = "adapter"
"""Where the process leaves what it has made."""
OF_THE_PARENT = set(OWN_KEYS["peft"][1]) - {"lora_dropout"}
"""Keys that are settled where an adapter is trained further."""
DEFAULT_SEED = 42


class Layout:
    def __init__(self, files: FileStore, base: BaseModel, settings: Settings) -> None:
        self._files = files
        self._base = base
        self._settings = settings

    def require_files(self, fields: JobFields) -> dict[str, DataFile]:
        """By the name of the field. Raises BadRequest."""
        files = {"training_file": require_data(self._files, "training_file", fields.training_file)}
        if fields.validation_file is not None:
            files["validation_file"] = require_data(self._files, "validation_file", fields.validation_file)
        return files

    def lay_out(
        self, directory: Path, name: str, fields: JobFields, files: Mapping[str, DataFile], adapter: Path | None
    ) -> dict[str, Any]:
        """Everything that the process reads. `adapter`: the one that is trained further. Gives what `auto` became."""
        directory.mkdir(parents=True, exist_ok=True)
        for param, file in files.items():
            link_data(self._files, param, file, directory / data_path(param, file))
        rows = _rows(directory / data_path("training_file", files["training_file"]))
        resolved = resolve(fields.wanted, rows)
        sections = self.sections(name, fields, files, resolved)
        if adapter is not None:
            sections["model"]["adapter_name_or_path"] = str(adapter.absolute())
            sections["peft"] = _form_of(adapter, self._settings.max_lora_rank)
        (directory / "run.yaml").write_text(json.dumps(sections, indent=1), encoding="utf-8")  # JSON is YAML
        return asdict(resolved)

    def sections(
        self, name: str, fields: JobFields, files: Mapping[str, DataFile], resolved: Resolved
    ) -> dict[str, Any]:
        paths = {param: str(data_path(param, file)) for param, file in files.items()}
        data: dict[str, Any] = {"train": [paths["training_file"]]}
        if "validation_file" in paths:
            data["eval"] = paths["validation_file"]
        fixed: dict[str, dict[str, Any]] = {
            "model": {"model_name_or_path": str(self._base.path.absolute())},
            "quantization": {"load_in_4bit": self._settings.quantization == "nf4"},
            "data": data,
            "training": {"seed": DEFAULT_SEED if fields.seed is None else fields.seed},
            "output": {"output_dir": ADAPTER, "name": name, "max_lora_rank": self._settings.max_lora_rank},
        }
        return configuration(fields.wanted, resolved, fixed)


def _form_of(adapter: Path, max_rank: int) -> dict[str, Any]:
    """What `peft` must say to make the same matrices."""
    config = read_config(adapter / CONFIG, max_rank)
    if config.rank_pattern or config.alpha_pattern or config.alpha != int(config.alpha):
        raise ConfigError("model: the adapter's modules differ in rank or scale; such a one cannot be trained further")
    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    rslora = {"use_rslora": True} if config.use_rslora else {}
    return {"r": config.rank, "lora_alpha": int(config.alpha), "target_modules": targets, **rslora}


def _rows(path: Path) -> int:
    with path.open("rb") as file:
        return max(1, sum(bool(line.strip()) for line in file))
