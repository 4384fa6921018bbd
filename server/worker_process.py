"""A process that trains or merges beside the engine: begun, listened to, stopped. Knows no jobs, and not the work."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from adapters import errors
from adapters.errors import AdapterError

LOG = "worker.log"
LINE_BYTES = 1 << 22
"""The longest message."""
TAIL_CHARACTERS = 600


class WorkerProcess:
    """One process at work in a directory; see adapters/background.py for how it speaks."""

    def __init__(self, process: asyncio.subprocess.Process, doing: str, log: Path) -> None:
        self._process = process
        self._doing = doing
        self._log = log

    async def heard(self, timeout_s: float) -> Mapping[str, Any] | None:
        """Its next message; empty when it has said nothing for so long, None when it is gone."""
        assert self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), timeout_s)
        except TimeoutError:
            return {}
        if not line.endswith(b"\n"):  # a half line is what a kill leaves
            await self._process.wait()
            return None
        message: dict[str, Any] = json.loads(line)
        return message

    async def stop(self, timeout_s: float) -> None:
        """Ask it to stop where it can be taken up again, and wait; whoever leaves `running` kills what is left."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while await self.heard(timeout_s) is not None:
                    pass

    def how_it_ended(self) -> str:
        code = self._process.returncode
        name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        tail = self._log.read_text(errors="replace").strip()[-TAIL_CHARACTERS:] if self._log.exists() else ""
        return f"the {self._doing} process ended with {name}" + f": …{tail}" * bool(tail)


@asynccontextmanager
async def running(
    module: str, doing: str, directory: Path, memory_bytes: int | None, threads: int
) -> AsyncIterator[WorkerProcess]:
    """A process of its own session: a signal for the server must not reach it. It is gone when the block ends.

    `module` is run in `directory`, which is absolute; `doing` says what for, in one word.
    """
    command = [sys.executable, "-m", module, str(directory)]
    command += [] if memory_bytes is None else ["--memory-bytes", str(memory_bytes)]
    with (directory / LOG).open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env=_environment(threads),
            start_new_session=True,
            limit=LINE_BYTES,
        )
    try:
        yield WorkerProcess(process, doing, directory / LOG)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await asyncio.shield(process.wait())


def _environment(threads: int) -> dict[str, str]:
    """Threads that spin while they wait would take the engine's cores; and nothing is fetched from a hub."""
    own = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return {**os.environ, **own, **offline}


def error_of(told: Mapping[str, Any]) -> AdapterError:
    """Of what a process says in its last message, as it was raised there."""
    kind = getattr(errors, told.get("class", ""), errors.AdapterError)
    made: AdapterError = kind(told["message"], code=told["code"])
    return made
