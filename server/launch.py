"""A server as a child process: start it, wait until it can generate, stop it. For the demo, tests and load tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx


class LaunchError(Exception):
    """The child ended, or was not ready in time; the message ends with the last lines of its log."""


@dataclass
class ServerProcess:
    """One running child. As a context manager it is stopped at the end."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    ready_path: str = "/readyz"

    def wait_ready(self, timeout_s: float = 300.0) -> float:
        """Seconds until `ready_path` answered 200. Raises LaunchError."""
        started = time.monotonic()
        with httpx.Client(timeout=5, trust_env=False) as client:
            while time.monotonic() - started < timeout_s:
                if self.process.poll() is not None:
                    raise LaunchError(f"the server ended with exit code {self.process.returncode}:\n{self.tail()}")
                try:
                    if client.get(self.url + self.ready_path).status_code == 200:
                        return time.monotonic() - started
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
        raise LaunchError(f"the server was not ready after {timeout_s:g} s:\n{self.tail()}")

    def stop(self, timeout_s: float = 60.0) -> int:
        """SIGTERM, then SIGKILL to whatever is left of its process group. Returns the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
        self.kill()
        return self.process.returncode

    def kill(self) -> None:
        """SIGKILL to the whole process group: what a power cut looks like."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def tail(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.stop()


def launch(
    arguments: Sequence[str], log: Path, *, port: int | None = None, env: Mapping[str, str] | None = None
) -> ServerProcess:
    """Start `loraplex serve` with `arguments` on loopback; everything it prints goes to `log`."""
    chosen = port or free_port()
    command = [sys.executable, "-m", "server", "--port", str(chosen), *arguments]
    return start(command, f"http://127.0.0.1:{chosen}", log, env=env)


def start(command: Sequence[str], url: str, log: Path, *, env: Mapping[str, str] | None = None) -> ServerProcess:
    """Start any server in a process group of its own."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    return ServerProcess(process, url, log)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
