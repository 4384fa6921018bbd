"""Large tensors outside glibc's heap: in it each leaves a hole when it goes, and a step has many of many sizes.

Measured on the demo base: 1.7 instead of 2.0 GB at the peak, for no processor time that could be measured.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h. Setting it also stops malloc from raising it by itself, to as much as 32 MiB."""
MAPPED_BYTES = 4 << 20
"""What is this large is mapped on its own and goes back when it goes. With 1 MiB the peak was 80 MB lower still, but a
step took a fifth more processor time."""
LOADING_BYTES = 1 << 20
"""While a base is loaded, whose weights come and go between packed ones that stay: in the heap they left nothing or up
to 400 MB behind, as chance would have it, of 135 M parameters."""


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
        if (library := _glibc()) is not None:
            library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
