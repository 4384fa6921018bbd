"""Speaks as adapters/train/worker.py does, trains nothing: three steps, each when the test lets it, and an adapter.

Beside the jobs' directories `attempts` lists the processes. In `control`, `step-N` lets step N be taken, and the text
of `wrong` is told as an error of the data.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.adapters.factories import AdapterFiles

STEPS = 3


def tell(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def main(directory: Path) -> None:
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(1)), daemon=True).start()
    control = directory.parent.parent / "control"
    with (directory.parent / "attempts").open("a") as attempts:
        attempts.write(f"{os.getpid()}\n")
    tell(stage="validating")
    if (control / "wrong").exists():
        return tell(error={"code": "bad_data", "message": (control / "wrong").read_text()})
    tell(stage="training", train_rows=9, held_out_rows=1)
    lines = []
    for number in range(1, STEPS + 1):
        while not (control / f"step-{number}").exists():
            time.sleep(0.01)
        figures = {"gradient_norm": 1.0, "learning_rate": 0.1, "tokens": 5, "seconds": 1}
        step = {"step": number, "loss": 4.0 - number, **figures}
        lines.append(json.dumps(step))
        tell(step=step, total_steps=STEPS)
    extra = {
        "log.jsonl": "\n".join(lines).encode(),
        "loraplex.json": json.dumps({"lineage": {"seed": 1}, "scores": {"held_out_loss": 1.5}}).encode(),
    }
    AdapterFiles(extra=extra).write(directory / "staged").rename(directory / "adapter")
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
