"""Our training against TRL's: seconds a step, peak memory, loss at the end. `python -m loadtests.training`

Both train a LoRA on the demo base in NF4 on the same rows, one process after the other, alternating: with gradient
checkpointing, which is TRL's default, and without, which is ours. Every repetition has a seed of its own, for both: the
order of the rows and the first A go by it, and the loss of a run so short goes by them. Needs TRL, which nothing else
here does:

    pip install --target .cache/trl --no-deps 'trl==1.16.*' datasets multiprocess xxhash dill pyarrow pandas
    python -m loadtests.training --trl .cache/trl
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from adapters.demo_base import DEFAULT_DESTINATION, prepare_demo_base
from loadtests.figures import Interval, ratio

OURS, THEIRS = "ours", "trl"
QUESTIONS = 3
"""Of the demo's rows in one of these: about 150 tokens, half of them trained."""
HELD_OUT = 12
SEED = 42
"""Of the first repetition."""
WARM_UP = 2
"""Steps at the beginning that are not timed."""
MISSING = """TRL cannot be imported ({}). For this comparison only:
  pip install --target .cache/trl --no-deps 'trl==1.16.*' datasets multiprocess xxhash dill pyarrow pandas
  python -m loadtests.training --trl .cache/trl"""


@dataclass(frozen=True)
class Outcome:
    step_s: float
    """Median."""
    peak_bytes: int
    """Of the whole process, imports and all."""
    loss: float
    """Held out, nats a trained token."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.training", description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="a run (default: 20)")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--batch", type=int, default=4, help="rows a step (default: 4)")
    parser.add_argument("--model", type=Path, default=DEFAULT_DESTINATION, help="base (default: the demo base)")
    parser.add_argument("--trl", type=Path, help="directory that TRL was installed into")
    arguments = parser.parse_args(argv)
    console = Console(stderr=True)
    environment = _environment(arguments.trl)
    if trouble := _missing(environment):
        console.print(MISSING.format(trouble), soft_wrap=True, markup=False)
        return 2
    if arguments.model == DEFAULT_DESTINATION:
        prepare_demo_base(arguments.model)
    found: dict[tuple[bool, str], list[Outcome]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number in track(range(arguments.repetitions), "repetitions", console=console):
            for checkpointing in (False, True):
                for side in (OURS, THEIRS) if number % 2 == 0 else (THEIRS, OURS):
                    place = Path(scratch) / f"{number}-{checkpointing}-{side}"
                    fixed = (arguments.model, arguments.steps, arguments.batch, checkpointing, environment)
                    bench = Bench(place, *fixed, seed=SEED + number)
                    found.setdefault((checkpointing, side), []).append(bench.run(side))
    _print(found)
    return 0


@dataclass(frozen=True)
class Bench:
    """One run of one side, in an empty directory."""

    place: Path
    base: Path
    steps: int
    batch: int
    checkpointing: bool
    environment: dict[str, str]
    seed: int
    learning_rate: float = 1e-3

    def run(self, side: str) -> Outcome:
        self.place.mkdir()
        held_out, train = combined_rows()
        (self.place / "held_out.json").write_text(json.dumps(held_out))
        seconds, peak = self._ours(train, held_out) if side == OURS else self._theirs(train)
        command = ["-m", "loadtests.training_loss", str(self.base.resolve()), str(self.place)]
        return Outcome(statistics.median(seconds[WARM_UP:]), peak, float(self._child(command)[0].splitlines()[-1]))

    def _ours(self, train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> tuple[list[float], int]:
        """All rows are trained, as TRL trains them."""
        values = {
            "model": {"model_name_or_path": str(self.base.resolve())},
            "peft": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
            "data": {"train": ["rows.jsonl"], "eval": "held_out.jsonl", "max_length": 512},
            "training": {
                "max_steps": self.steps,
                "per_device_train_batch_size": self.batch,
                "learning_rate": self.learning_rate,
                "lr_scheduler_type": "constant",
                "warmup_steps": 0,
                "gradient_checkpointing": self.checkpointing,
                "seed": self.seed,
            },
            "eval": {"eval_steps": "never"},
            "output": {"output_dir": str(self.place / "adapter"), "name": "bench", "save_steps": "never"},
        }
        for name, rows in (("rows", train), ("held_out", held_out)):
            (self.place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (self.place / "run.yaml").write_text(yaml.safe_dump(values))
        _, peak = self._child(["-m", "adapters.train", "run", str(self.place / "run.yaml")])
        lines = map(json.loads, (self.place / "adapter" / "log.jsonl").read_text().splitlines())
        return [line["seconds"] for line in lines if "seconds" in line], peak

    def _theirs(self, train: list[dict[str, Any]]) -> tuple[list[float], int]:
        """In TRL's own form: the prompt and its completion apart, of which the completion is trained."""
        from adapters.processor import multiplies_bf16

        rows = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in train]
        (self.place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        settings = {
            "base": str(self.base.resolve()),
            "data": str(self.place / "rows.jsonl"),
            "cache": str(self.place / "cache"),
            "output": str(self.place / "adapter"),
            "dtype": "bfloat16" if multiplies_bf16() else "float32",
            "r": 8,
            "lora_alpha": 16,
            "max_steps": self.steps,
            "batch": self.batch,
            "learning_rate": self.learning_rate,
            "max_length": 512,
            "gradient_checkpointing": self.checkpointing,
            "seed": self.seed,
        }
        (self.place / "settings.json").write_text(json.dumps(settings))
        told, peak = self._child(["-m", "loadtests.rivals.trl_train", str(self.place / "settings.json")])
        return json.loads(told.splitlines()[-1]), peak

    def _child(self, arguments: list[str]) -> tuple[str, int]:
        """What it printed, and the most memory that it had."""
        with (
            (self.place / "out").open("w+") as out,
            (self.place / "err").open("w+") as err,
            subprocess.Popen([sys.executable, *arguments], stdout=out, stderr=err, env=self.environment) as process,
        ):
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                err.seek(0)
                raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}:\n{err.read()[-4000:]}")
            out.seek(0)
            return out.read(), usage.ru_maxrss << 10


def combined_rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Held out and for training: the demo's rows, several questions in one; no question is in both."""
    demo = files("adapters.train") / "demo" / "pirate.jsonl"
    rows = [json.loads(line)["messages"] for line in demo.read_text(encoding="utf-8").splitlines()]
    return _combined(rows[:HELD_OUT]), _combined(rows[HELD_OUT:])


def _combined(rows: list[list[dict[str, str]]]) -> list[dict[str, Any]]:
    chosen = [[rows[(number + 7 * offset) % len(rows)] for offset in range(QUESTIONS)] for number in range(len(rows))]
    return [{"messages": [_joined(messages, role) for role in (0, 1)]} for messages in chosen]


def _joined(conversations: list[list[dict[str, str]]], role: int) -> dict[str, str]:
    contents = " ".join(messages[role]["content"] for messages in conversations)
    return {"role": ("user", "assistant")[role], "content": contents}


def _environment(trl: Path | None) -> dict[str, str]:
    """TRL's directory comes last: what we have installed ourselves is used by both sides."""
    here = str(Path(__file__).parents[1])
    paths = [here, *([str(trl.resolve())] if trl else [])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def _missing(environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", "import trl, datasets"]
    tried = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return tried.stderr.strip().splitlines()[-1] if tried.returncode else ""


def _print(found: dict[tuple[bool, str], list[Outcome]]) -> None:
    table = Table(
        title="ours / TRL's, with 95 % confidence intervals; medians of the repetitions. Loss: mean ± standard error"
    )
    for heading in ("gradient checkpointing", "", "ours", "TRL", "ratio, of the loss the difference"):
        table.add_column(heading, justify="right" if heading not in ("gradient checkpointing", "") else "left")
    for checkpointing in (False, True):
        ours, theirs = found[checkpointing, OURS], found[checkpointing, THEIRS]
        for what, form, field, unit in (
            ("seconds a step", "{:.2f}", "step_s", 1),
            ("peak memory, MB", "{:.0f}", "peak_bytes", 1e6),
        ):
            values = [[getattr(outcome, field) / unit for outcome in side] for side in (ours, theirs)]
            medians = [form.format(statistics.median(side)) for side in values]
            table.add_row("on" if checkpointing else "off", what, *medians, _shown(ratio(values[0], values[1])))
        losses = [[outcome.loss for outcome in side] for side in (ours, theirs)]
        table.add_row("on" if checkpointing else "off", "held-out loss", *map(_spread, losses), _difference(*losses))
    Console().print(table)


def _spread(losses: list[float]) -> str:
    return f"{statistics.mean(losses):.3f} ± {_error(losses):.3f}"


def _difference(ours: list[float], theirs: list[float]) -> str:
    """With its standard error, over seeds."""
    return f"{statistics.mean(ours) - statistics.mean(theirs):+.3f} ± {math.hypot(_error(ours), _error(theirs)):.3f}"


def _error(values: list[float]) -> float:
    """Of their mean; nothing is known of it from one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _shown(interval: Interval) -> str:
    return f"{interval.mean:.2f} ({interval.low:.2f} to {interval.high:.2f})"


if __name__ == "__main__":
    sys.exit(main())
