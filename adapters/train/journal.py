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

from adapters.train.trackers import Tracker

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


@dataclass(frozen=True)
class Evaluation:
    step: int
    held_out_loss: float
    """Of the adapter, in nats per trained token; at step 0 of the base."""
    general_loss: float | None = None
    """The same on general data: what it rises by is what was forgotten."""


class Journal:
    """Goes on behind what the log holds already: the steps of a run before it was interrupted."""

    def __init__(
        self,
        directory: Path,
        name: str,
        total_steps: int,
        watch: Watch | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.steps, self.evaluations = read_log(directory / LOG)
        self._begun_with = len(self.steps)
        self._watch = watch
        self._trackers = trackers
        self._total_steps = total_steps
        self._file = (directory / LOG).open("a", encoding="utf-8")
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
        self._task = self._progress.add_task(
            f"training {name}", total=total_steps, figures="", completed=len(self.steps)
        )

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
        self._write(step)
        fresh = self.steps[self._begun_with :]
        rate = sum(s.tokens for s in fresh) / sum(s.seconds for s in fresh)
        self._progress.update(self._task, advance=1, figures=f"loss {step.loss:.3f} · {rate:.0f} tokens/s")
        if self._watch is not None:
            self._watch(step, self._total_steps)

    def evaluated(self, evaluation: Evaluation) -> None:
        self.evaluations.append(evaluation)
        self._write(evaluation)

    def _write(self, line: Step | Evaluation) -> None:
        self._file.write(json.dumps(asdict(line)) + "\n")
        self._file.flush()
        figures = {key: value for key, value in asdict(line).items() if key != "step" and value is not None}
        for tracker in self._trackers:
            tracker(line.step, figures)


def read_log(path: Path) -> tuple[list[Step], list[Evaluation]]:
    """Empty where there is none."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    steps = [Step(**row) for row in rows if "loss" in row]
    return steps, [Evaluation(**row) for row in rows if "held_out_loss" in row]


def draw_curve(steps: Sequence[Step], evaluations: Sequence[Evaluation], held_out: float, path: Path) -> None:
    """`evaluations`: the first is the base's. `held_out`: of the weights that are saved."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per trained token)")
    axes.plot([s.step for s in steps], [s.loss for s in steps], label="training")
    base, *looks = evaluations
    axes.plot([e.step for e in looks], [e.held_out_loss for e in looks], "o-", color="green", label="held out")
    general = [(e.step, e.general_loss) for e in evaluations if e.general_loss is not None]
    if general:
        axes.plot(*zip(*general, strict=True), "s-", color="orange", label="general data")
    axes.axhline(base.held_out_loss, linestyle=":", color="grey", label=f"held out, base {base.held_out_loss:.2f}")
    axes.axhline(held_out, linestyle="--", color="green", label=f"held out, as saved {held_out:.2f}")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=110)
