"""A test run that is killed leaves no servers behind: a watcher outlives it and kills what carries its mark.

The mark is a variable of the environment, which all processes inherit that a test starts, daemons too. Knows nothing of
what they are. Linux: elsewhere nothing is found.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARK = "TEST_RUN_MARK"


@contextmanager
def none() -> Iterator[None]:
    """What is started inside the block and still there when this process has left it, or died, is killed."""
    before, mark = os.environ.get(MARK), uuid.uuid4().hex
    with subprocess.Popen([sys.executable, __file__, mark], stdin=subprocess.PIPE, start_new_session=True):
        os.environ[MARK] = mark
        try:
            yield
        finally:
            os.environ.pop(MARK)
            if before is not None:
                os.environ[MARK] = before


def marked(mark: str) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone, or somebody else's
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def main(mark: str) -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    sys.stdin.buffer.read()  # its end is that of the run, or of the block
    while survivors := marked(mark):
        for process in survivors:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


if __name__ == "__main__":
    main(sys.argv[1])
