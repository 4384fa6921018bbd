"""What a run tells while it goes: a progress bar for people, a JSON line a step for programs, a curve at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LOG = "log.jsonl"
CURVE = "loss.png"


@dataclass(frozen=True)
class Step:
    step: int
    loss: float
    """Mean over the trained tokens of the step, in nats."""
    gradient_norm: float
    """Before clipping."""
    learning_rate: float
    tokens: int
    """Read, without padding."""
    seconds: float


Watch = Callable[[Step, int], None]
"""Told of every step when it is done, and how many there are in all. What it raises ends the run there."""


class Journal:
    def __init__(self, directory: Path, name: str, total_steps: int, watch: Watch | None = None) -> None:
        self.steps: list[Step] = []
        self._watch = watch
        self._total_steps = total_steps
        self._file = (directory / LOG).open("w", encoding="utf-8")
        self._progress = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
        )
        self._task = self._progress.add_task(f"training {name}", total=total_steps, figures="")

    def __enter__(self) -> Journal:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._file.close()

    def record(self, step: Step) -> None:
        self.steps.append(step)
        self._file.write(json.dumps(asdict(step)) + "\n")
        self._file.flush()
        rate = sum(s.tokens for s in self.steps) / sum(s.seconds for s in self.steps)
        self._progress.update(self._task, advance=1, figures=f"loss {step.loss:.3f} · {rate:.0f} tokens/s")
        if self._watch is not None:
            self._watch(step, self._total_steps)


def draw_curve(steps: Sequence[Step], held_out: float, held_out_base: float, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per trained token)")
    axes.plot([s.step for s in steps], [s.loss for s in steps], label="training")
    axes.axhline(held_out_base, linestyle=":", color="grey", label=f"held out, base {held_out_base:.2f}")
    axes.axhline(held_out, linestyle="--", color="green", label=f"held out, adapter {held_out:.2f}")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=110)
