"""kill -9 at 20 random moments of a run, each gone on with: the weights are those of the run that nobody killed."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

TIMES, SEED = 20, 0


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(write_yaml: Callable[..., Path]) -> None:
    path = write_yaml(
        peft={"r": 4, "lora_dropout": 0.3},
        training={"max_steps": 3},
        eval={"prompts": []},
        output={"save_total_limit": 1},
    )
    command = [sys.executable, "-m", "tests.adapters.train.crash_child", str(path), str(TIMES), str(SEED)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # a pool of threads does not survive a fork
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
    print(f"seed {SEED}", *told, sep="\n")
    assert len(told) == TIMES + 1
    expected = told[0].split()[-1]
    for line in told[1:]:
        assert line.endswith(expected), line
        assert "left ['out']" in line, line
    writing = [line for line in told if "checkpoint:" in line]
    assert TIMES // 4 < len(writing) < TIMES
