"""What a merging process is asked for: frozen, and as `order.json` in its directory. Paths are absolute."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapters.base import BaseModel
from adapters.merge.bases import Asked
from adapters.merge.plan import Dtype

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
class MergeOrder:
    """An adapter and its base into a Hugging Face directory at `destination`."""

    adapter: str
    base: BasePlace
    destination: str
    values: Asked = "auto"
    dtype: Dtype = "bfloat16"


Order = MergeOrder
KINDS: dict[str, type[Order]] = {"merge": MergeOrder}


def write_order(directory: Path, order: Order) -> None:
    (kind,) = (name for name, each in KINDS.items() if isinstance(order, each))
    text = json.dumps({"kind": kind, **asdict(order)}, indent=1)
    (directory / ORDER).write_text(text + "\n", encoding="utf-8")


def read_order(directory: Path) -> Order:
    values: dict[str, Any] = json.loads((directory / ORDER).read_text(encoding="utf-8"))
    kind = KINDS[values.pop("kind")]
    return kind(**{**values, "base": BasePlace(**values["base"])})
