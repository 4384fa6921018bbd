"""The adapter on a model, not merged: what PEFT computes of it, which every merge is compared with."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapters.base import WEIGHT, BaseModel
from adapters.convert import convert
from adapters.convert.kinds import LARGEST_RANK
from adapters.convert.source import PREFIX
from adapters.json_document import read_document
from adapters.merge.embeddings import OF_BASE
from adapters.merge.files import prefix_of
from adapters.peft_config import modified_base
from adapters.safetensors_header import read_header
from adapters.upload import CONFIG, INITIAL, WEIGHTS


def with_adapter(model: Any, adapter: Path, base: Path) -> Any:
    """`base`: the directory of what the adapter was trained for, whatever values `model` has."""
    from peft import PeftModel

    with _for_peft(adapter, base) as directory:
        return PeftModel.from_pretrained(model, str(directory)).eval()


def brought_along(adapter: Path) -> set[str]:
    """Tensors of the base that lie in its file, as adapted embeddings do; PEFT lays them over the base's."""
    names = read_header(adapter / f"{prefix_of(adapter)}{WEIGHTS}")
    return {name.removeprefix(PREFIX).removesuffix(OF_BASE) + WEIGHT for name in names if name.endswith(OF_BASE)}


@contextmanager
def _for_peft(adapter: Path, base: Path) -> Iterator[Path]:
    """As it was sent, where a LoRA that is only near it is served. One whose start was taken out of the base (PiSSA) as
    the LoRA on the whole base that it is, for PEFT would take its start out of whatever values it is given."""
    prefix = prefix_of(adapter)
    began_in_base = modified_base(read_document(adapter / f"{prefix}{CONFIG}"))
    if not prefix and not began_in_base:
        yield adapter
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(adapter / f"{prefix}{name}", copy / name)
        if (adapter / INITIAL).is_file():
            shutil.copyfile(adapter / INITIAL, copy / INITIAL)
        if began_in_base:
            convert(copy, BaseModel.read(base), LARGEST_RANK)
        yield copy
