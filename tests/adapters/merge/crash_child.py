"""Merges and is killed at every STEP-th instant, each time later; then merges again. A line of JSON for each.

    python -m tests.adapters.merge.crash_child ADAPTER BASE WORK STEP

Forks from one warm process: importing torch takes longer than all the rest.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from adapters.base import BaseModel
from adapters.merge.apply import write_merged
from adapters.merge.plan import MergePlan, plan_merge
from adapters.store import hash_files
from tests.adapters.instants import Instants


def in_a_child(work: Callable[[], None]) -> bool:
    """Whether it came to its end."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def die_at(plan: MergePlan, root: Path, number: int) -> Callable[[], None]:
    def at(count: int, what: str) -> None:
        if count == number:
            (root.parent / "instant").write_text(what)
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        instants = Instants(root, at)
        instants.install()
        write_merged(plan, root / "out", lambda name, size: instants.reach("tensor"))

    return work


def go_on(plan: MergePlan, root: Path) -> Callable[[], None]:
    def work() -> None:
        written: list[str] = []
        sys.addaudithook(
            lambda event, details: (
                written.append(Path(details[0]).name)
                if event == "open" and str(details[0]).endswith(".safetensors.part")
                else None
            )
        )
        write_merged(plan, root / "out")
        (root.parent / "written").write_text(json.dumps(written))

    return work


def finished(root: Path) -> list[str]:
    state = root / ".out.merging/unfinished.json"
    return sorted(json.loads(state.read_text())["shards"]) if state.is_file() else []


def main(adapter: Path, base: Path, work: Path, step: int) -> None:
    assert torch.get_num_threads() == 1, "a pool of threads does not survive a fork"
    plan = plan_merge(adapter, BaseModel.read(base), "original")
    for number in range(1, 10_000, step):
        root = work / str(number) / "place"
        root.mkdir(parents=True)
        ended = in_a_child(die_at(plan, root, number))
        kept, there = finished(root), (root / "out").exists()
        assert in_a_child(go_on(plan, root))
        found = {
            "ended": ended,
            "instant": "" if ended else (root.parent / "instant").read_text(),
            "there": there,
            "kept": kept,
            "written": json.loads((root.parent / "written").read_text()),
            "left": sorted(path.name for path in root.iterdir()),
            "files": hash_files(root / "out"),
        }
        print(json.dumps(found), flush=True)
        if ended:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
