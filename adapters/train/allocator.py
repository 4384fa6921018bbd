"""Large tensors outside glibc's heap: in it each leaves a hole when it goes, and a step has many of many sizes.

An aligned block, as torch asks for, never fits the hole of one of its own size (glibc before 2.38): each layer of a
step left 10 to 15 MB behind.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h. Setting it also stops malloc from raising it by itself, to as much as 32 MiB."""
MAPPED_BYTES = 2 << 20
"""What is this large is mapped on its own and goes back when it goes. Eight layers of the demo base, 4 × 512 tokens
with gradient checkpointing, beyond the model: 240 MB with 4 MiB, 160 with 2 MiB in huge pages for 2 to 13 % more
processor time, 160 with 1 MiB for 13 to 17 % more. By arithmetic 133."""
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""What torch reads: tensors of 2 MiB and more in huge pages, which a new mapping gets filled in one go."""
LOADING_BYTES = 1 << 20
"""While a base is loaded, whose weights come and go between packed ones that stay: in the heap they left nothing or up
to 400 MB behind, as chance would have it, of 135 M parameters."""


def use_huge_pages() -> None:
    """For the rest of the process; where the kernel leaves it to programs. Torch reads it at its first tensor."""
    os.environ.setdefault(HUGE_PAGES, "1")


def map_large_tensors(smallest: int = MAPPED_BYTES) -> None:
    """For the rest of the process. A no-op where the C library is another."""
    if (library := _glibc()) is not None:
        library.mallopt(M_MMAP_THRESHOLD, smallest)


@contextmanager
def while_loading() -> Iterator[None]:
    """Afterwards the heap holds what is left of the block, and large tensors stay outside it."""
    map_large_tensors(LOADING_BYTES)
    try:
        yield
    finally:
        map_large_tensors()
        give_back()


def give_back() -> None:
    """Pages of the heap, of every thread's, that nothing is in: what is freed between things that stay is kept else."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
