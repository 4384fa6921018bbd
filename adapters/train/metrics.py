"""What a finished run says of itself in figures, read from the log in its directory: a table, and the sums of it."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.train.journal import LOG
from adapters.upload import PROVENANCE

COLUMNS = ("step", "train_loss", "valid_loss", "learning_rate", "gradient_norm", "tokens", "seconds")


@dataclass(frozen=True)
class Metrics:
    table: str
    """CSV, a row a step."""
    steps: int
    trained_tokens: int
    """Read in all steps, without padding."""
    train_loss: float
    """Of the last step."""
    valid_loss: float
    """On the held-out rows, of the weights that were saved."""


def read_metrics(directory: Path) -> Metrics:
    lines = [json.loads(line) for line in (directory / LOG).read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    looks = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    saved = json.loads((directory / PROVENANCE).read_text(encoding="utf-8"))["scores"]["held_out_loss"]
    looks.setdefault(steps[-1]["step"], saved)
    out = io.StringIO()
    table = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(_row(step, looks) for step in steps)
    tokens = sum(step["tokens"] for step in steps)
    return Metrics(out.getvalue(), len(steps), tokens, steps[-1]["loss"], saved)


def _row(step: dict[str, Any], looks: dict[int, float]) -> dict[str, Any]:
    figures = {name: step[name] for name in ("learning_rate", "gradient_norm", "tokens", "seconds")}
    return {"step": step["step"], "train_loss": step["loss"], "valid_loss": looks.get(step["step"], ""), **figures}
