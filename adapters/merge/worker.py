"""`python -m adapters.merge.worker DIRECTORY`: one merge for a server, in a process of its own, out of its way.

`order.json` there says what. How it speaks and how it ends: adapters/background.py; its last message has `done`, also
where a predecessor had come to the end of it already. It knows no server.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.background import Duty, Tell, serve
from adapters.merge.apply import write_merged
from adapters.merge.orders import MergeOrder, Order, read_order
from adapters.merge.plan import plan_merge

TELL_S = 0.1
"""Between two messages about how far it is."""


def main(argv: Sequence[str]) -> int:
    duty = Duty(
        module="adapters.merge.worker",
        work=lambda tell: tell({"done": dict(work(read_order(Path()), tell))}),
        doing="merging",
        setting="merge_memory_bytes",
        advice="raise the limit",
    )
    return serve(duty, argv)


def work(order: Order, tell: Tell) -> Mapping[str, Any]:
    """What the server keeps of it."""
    return merge(order, tell)


def merge(order: MergeOrder, tell: Tell) -> Mapping[str, Any]:
    tell({"stage": "planning"})
    plan = plan_merge(Path(order.adapter), order.base.read(), order.values, order.dtype)
    return write_merged(plan, Path(order.destination), progress(tell, "merging", plan.size_bytes))


def progress(tell: Tell, stage: str, total_bytes: int) -> Callable[[str, int], None]:
    """Called with a tensor's name and its bytes; says how many there are now."""
    done, told = 0, 0.0

    def advance(_: str, size: int) -> None:
        nonlocal done, told
        done += size
        if done >= total_bytes or time.monotonic() - told > TELL_S:
            told = time.monotonic()
            tell({"stage": stage, "bytes": done, "total_bytes": total_bytes})

    return advance


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
