"""Long computations beside a server that answers: in a thread of their own, behind everything else on the machine."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from threadpoolctl import threadpool_limits

Result = TypeVar("Result")
NICENESS = 15


def aside(work: Callable[[], Result]) -> Result:
    """Its result, when it is there. One core at most, and only where nobody else wants it."""
    done: Future[Result] = Future()
    thread = threading.Thread(target=_run, args=(work, done), daemon=True, name="aside")
    thread.start()
    thread.join()
    return done.result()


def _run(work: Callable[[], Result], done: Future[Result]) -> None:
    try:
        if sys.platform == "linux":  # there a thread has a priority of its own; it ends with it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        with threadpool_limits(1, user_api="blas"):
            done.set_result(work())
    except BaseException as error:
        done.set_exception(error)
