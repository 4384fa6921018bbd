"""A tiny base and a whole artifact side around it: store, registry, ingest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from adapters.archive import UploadLimits
from adapters.base import BaseModel
from adapters.ingest import Ingest
from adapters.local_store import LocalStore
from adapters.registry import Registry
from tests.adapters.factories import write_base

MAX_RANK = 16


@dataclass(frozen=True)
class Shop:
    root: Path
    base: BaseModel
    store: LocalStore
    registry: Registry
    ingest: Ingest

    def contents(self) -> dict[str, bytes]:
        """Every file of the store, staging included."""
        return {str(path.relative_to(self.root)): path.read_bytes() for path in self.root.rglob("*") if path.is_file()}


@pytest.fixture
def tiny_base(tmp_path: Path) -> BaseModel:
    return BaseModel.read(write_base(tmp_path / "tiny"))


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(f"sqlite:///{tmp_path}/registry.db")
    yield registry
    registry.close()


@pytest.fixture
def shop(tmp_path: Path, tiny_base: BaseModel, registry: Registry) -> Shop:
    store = LocalStore(tmp_path / "store")
    limits = UploadLimits(max_bytes=1 << 20, max_files=50)
    return Shop(tmp_path / "store", tiny_base, store, registry, Ingest(store, registry, tiny_base, limits, MAX_RANK))
