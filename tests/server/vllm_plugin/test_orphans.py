"""A child process ends when the process that made it is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from server.vllm_plugin.orphans import end_with_parent
from tests.server.harness import PATIENCE_S

ROOT = Path(__file__).parents[3]
PROGRAM = """
import multiprocessing, sys, time
from tests.server.vllm_plugin.test_orphans import child
if __name__ == "__main__":
    process = multiprocessing.get_context(sys.argv[1]).Process(target=child, args=(sys.argv[2] == "watching",))
    process.start()
    time.sleep(600)
"""


def child(watching: bool) -> None:
    if watching:
        end_with_parent()
        end_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(600)


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.parametrize("watching", [True, False])
def test_a_child_ends_with_its_parent(method: str, watching: bool) -> None:
    command = [sys.executable, "-c", PROGRAM, method, "watching" if watching else "idle"]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    assert parent.stdout is not None
    process = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs([process], timeout=PATIENCE_S if watching else 0.5)
    for each in alive:
        each.kill()
    assert bool(alive) is not watching


def test_a_process_that_nobody_made_watches_nobody() -> None:
    assert multiprocessing.parent_process() is None
    end_with_parent()
