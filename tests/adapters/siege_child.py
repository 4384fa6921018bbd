"""Uploads every hostile case and prints by how many bytes the memory of the process grew at its highest.

python -m tests.adapters.siege_child
"""

from __future__ import annotations

import resource
import tempfile
from contextlib import suppress
from pathlib import Path

from adapters.base import BaseModel
from adapters.errors import AdapterError
from adapters.ingest import Ingest
from adapters.local_store import LocalStore
from adapters.registry import Registry
from tests.adapters import hostile
from tests.adapters.factories import AdapterFiles, write_base

MOST_BYTES = 2 << 30
"""Of address space; what wants more fails here, not on the machine."""


def highest_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main() -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        base = BaseModel.read(write_base(root / "tiny"))
        store, registry = LocalStore(root / "store"), Registry(f"sqlite:///{root}/registry.db")
        ingest = Ingest(store, registry, base, hostile.LIMITS, max_rank=16)
        ingest.upload("good", AdapterFiles().uploads())
        for case in hostile.every():  # making them takes memory, too, which is none of the gate's
            assert case.sent is not None
        before = highest_bytes()
        for case in hostile.every():
            with suppress(AdapterError):
                ingest.upload("bad", case.uploads())
        registry.close()
    return highest_bytes() - before


if __name__ == "__main__":
    print(main())
