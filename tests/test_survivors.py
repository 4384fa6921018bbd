from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

PROGRAM = """
import subprocess, sys, time
from tests import survivors
with survivors.none():
    print(subprocess.Popen(["sleep", "600"], start_new_session=True).pid, flush=True)
    time.sleep(600 if sys.argv[1] == "killed" else 0)
"""


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_what_a_run_started_does_not_outlive_it(how: str) -> None:
    command = [sys.executable, "-c", PROGRAM, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as run:
        assert run.stdout is not None
        started = psutil.Process(int(run.stdout.readline()))
        if how == "killed":
            run.kill()
    _, alive = psutil.wait_procs([started], timeout=120)
    assert not alive
