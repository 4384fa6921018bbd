"""An engine whose server was killed lives on: it waits for requests that nobody will send, and keeps its memory.

vLLM ends its processes when the server stops in order; after a SIGKILL (the kernel's, short of memory) nobody does. So
each of them watches the process that made it, and ends with it.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import wait

EXIT_CODE = 1
_lock = threading.Lock()
_watching = False


def end_with_parent() -> None:
    """In a child process of multiprocessing; elsewhere nothing happens. Safe to call more than once."""
    global _watching
    parent = multiprocessing.parent_process()
    with _lock:
        if parent is None or _watching:
            return
        _watching = True
    threading.Thread(target=_watch, args=(parent.sentinel,), daemon=True, name="parent-watch").start()


def _watch(sentinel: int) -> None:
    wait([sentinel])
    os._exit(EXIT_CODE)  # nothing here is worth saving, and a clean exit waits for threads that compute
