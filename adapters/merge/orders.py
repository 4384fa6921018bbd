"""What a merging process is asked for: frozen, and as `order.json` in its directory. Paths are absolute."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapters.base import BaseModel
from adapters.merge.bases import Asked
from adapters.merge.combine import Recipe
from adapters.merge.export.exporting import Format
from adapters.merge.plan import Dtype
from adapters.merge.report import Budget

ORDER = "order.json"


@dataclass(frozen=True)
class BasePlace:
    path: str
    name: str
    fingerprints: str
    """Where it is kept what was read of the base once."""

    @classmethod
    def of(cls, base: BaseModel, fingerprints: Path) -> BasePlace:
        return cls(str(base.path.absolute()), base.name, str(fingerprints.absolute()))

    def read(self) -> BaseModel:
        return BaseModel.read(Path(self.path), name=self.name, cache_dir=Path(self.fingerprints))


@dataclass(frozen=True)
class Proof:
    """What a merge is measured on, and how far it may be from its adapter; None: as adapters/merge/report.py says."""

    max_kl: float | None = None
    max_loss_increase: float | None = None
    accept_loss: bool = False
    accept_differences: bool = False
    """Of an export, that it reads texts or chats otherwise."""
    tokens: int = 2048
    data: tuple[str, ...] = ()
    """Paths of files of the task; without them, what the adapter held out, or chats of our own."""

    @property
    def budget(self) -> Budget:
        return Budget(self.max_kl, self.max_loss_increase)


@dataclass(frozen=True)
class MergeOrder:
    """An adapter and its base into a Hugging Face directory at `destination`, measured."""

    adapter: str
    base: BasePlace
    destination: str
    values: Asked = "auto"
    dtype: Dtype = "bfloat16"
    proof: Proof = Proof()


@dataclass(frozen=True)
class ExportOrder:
    """The same into the files of a format; `gguf-lora` takes the adapter alone, and measures no merge."""

    adapter: str
    base: BasePlace
    destination: str
    format: Format
    outtype: str | None
    values: Asked = "auto"
    proof: Proof = Proof()


@dataclass(frozen=True)
class ComposeOrder:
    """Several adapters into one plain LoRA; `recipe`: the fields of combine.Recipe."""

    adapters: tuple[str, ...]
    base: BasePlace
    destination: str
    recipe: Mapping[str, Any]


Order = MergeOrder | ExportOrder | ComposeOrder
KINDS: dict[str, type[Order]] = {"merge": MergeOrder, "export": ExportOrder, "compose": ComposeOrder}


def recipe_of(fields: Mapping[str, Any]) -> Recipe:
    """Raises MergeError."""
    return Recipe(**{**fields, "weights": tuple(fields["weights"])})


def write_order(directory: Path, order: Order) -> None:
    (kind,) = (name for name, each in KINDS.items() if isinstance(order, each))
    text = json.dumps({"kind": kind, **asdict(order)}, indent=1)
    (directory / ORDER).write_text(text + "\n", encoding="utf-8")


def read_order(directory: Path) -> Order:
    values: dict[str, Any] = json.loads((directory / ORDER).read_text(encoding="utf-8"))
    kind = KINDS[values.pop("kind")]
    values["base"] = BasePlace(**values["base"])
    if "proof" in values:
        proof = values["proof"]
        values["proof"] = Proof(**{**proof, "data": tuple(proof["data"])})
    if "adapters" in values:
        values["adapters"] = tuple(values["adapters"])
    return kind(**values)
