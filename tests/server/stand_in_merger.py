"""The merging process with its measuring left out, for which a base must be a model; it merges when the test lets it.

Beside the jobs' directories `attempts` lists the processes. While `hold` is in `control`, a merge stops after its first
tensor. The text of `kl` is what it is said to have lost.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapters.merge import verify, worker
from adapters.merge.plan import MergePlan
from adapters.merge.report import Closeness, FidelityReport, VariantReport, name_of


def variant(part: Any, plan: MergePlan, stored: str, kl: float) -> VariantReport:
    found = Closeness(loss=1.0, kl=kl, mean_change=kl, largest_change=kl, same_top=1.0)
    return VariantReport(part, plan.choice.values, stored, "float32", found, found)


def report_of(plan: MergePlan, wishes: verify.Wishes, kl: float) -> FidelityReport:
    stored = wishes.stored or plan.dtype
    probes = ", ".join(path.read_text() for path in wishes.data) or "a test"
    variants = (variant("adapter", plan, "float32", 0.0), variant("merged", plan, stored, kl))
    judged = name_of("merged", plan.choice.values, stored)
    names = (plan.adapter.name, plan.base.name, plan.choice.values, judged)
    return FidelityReport(*names, probes, 1, 1, variants, ())


def main(argv: list[str]) -> int:
    jobs = Path(argv[0]).parent
    control = jobs.parent / "control"
    with (jobs / "attempts").open("a") as attempts:
        attempts.write(f"{os.getpid()}\n")
    kl = float((control / "kl").read_text()) if (control / "kl").exists() else 0.001
    real = worker.progress

    def held(tell: Any, stage: str, total_bytes: int) -> Callable[[str, int], None]:
        advance = real(tell, stage, total_bytes)

        def wait(name: str, size: int) -> None:
            advance(name, size)
            while (control / "hold").exists():
                time.sleep(0.01)

        return wait

    worker.progress = held
    verify.measured = lambda plan, wishes, *_: report_of(plan, wishes, kl)
    return worker.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
