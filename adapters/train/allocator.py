"""Large tensors outside glibc's heap: in it each leaves a hole when it goes, and a step has many of many sizes.

Measured on the demo base: 1.7 instead of 2.0 GB at the peak, for no processor time that could be measured.
"""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h. Setting it also stops malloc from raising it by itself, to as much as 32 MiB."""
MAPPED_BYTES = 4 << 20
"""What is this large is mapped on its own and goes back when it goes. With 1 MiB the peak was 80 MB lower still, but a
step took a fifth more processor time."""


def map_large_tensors() -> None:
    """For the rest of the process. A no-op where the C library is another."""
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
