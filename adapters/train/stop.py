"""SIGTERM and Ctrl-C while steps are taken: a request to stop, which the run meets after the step it is in.

A second Ctrl-C does not wait.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    """`by`: who asked, empty while nobody has. Whoever runs training from a program of their own sets it, too."""

    by: str = ""


@contextmanager
def listening(request: StopRequest) -> Iterator[None]:
    """Only a main thread can listen to signals; elsewhere nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if request.by and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.by = signal.Signals(number).name

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
