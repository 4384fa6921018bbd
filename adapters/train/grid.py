"""A grid of short runs over one configuration: rank × modules × alpha, each result kept as soon as its run has ended.

The file of results is also what a second call goes on from: a run whose configuration is in it is not done again, and
one that was stopped goes on from its own checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from adapters.errors import ConfigError, DataError, Diverged
from adapters.train.architecture import Architecture, architecture_of, read_config
from adapters.train.config import TrainConfig
from adapters.train.forecast import ranks_of

RESULTS = "sweep.jsonl"
DOUBLE = "2r"
"""Of alpha: twice the rank, whatever the rank is."""


@dataclass(frozen=True)
class Point:
    targets: str
    """A preset, or names of modules joined by `+`."""
    r: int
    alpha: str
    """A number, or `2r`."""

    @property
    def lora_alpha(self) -> int:
        return 2 * self.r if self.alpha == DOUBLE else int(self.alpha)


@dataclass(frozen=True)
class Result:
    key: str
    targets: str
    r: int
    alpha: str
    parameters: int
    base: float | None
    """Held-out loss of the base; None when the run diverged."""
    loss: float | None
    seconds: float


Run = Callable[[TrainConfig], tuple[float, float, float]]
"""A configuration → held-out loss of the base and of the adapter, and the seconds that the steps took."""


def points(targets: Sequence[str], ranks: Sequence[int], alphas: Sequence[str]) -> list[Point]:
    """All of them. Raises ConfigError for an alpha that is none."""
    for alpha in alphas:
        if alpha != DOUBLE and not (alpha.isdigit() and int(alpha) > 0):
            raise ConfigError(f"--alpha {alpha}: expected a whole number of at least 1, or {DOUBLE} for twice the rank")
    return [Point(name, rank, alpha) for name in targets for rank in ranks for alpha in alphas]


def configured(config: TrainConfig, point: Point, directory: Path) -> TrainConfig:
    """Checked anew, so that a point that makes no sense is an error before the first run."""
    values = config.model_dump(mode="json", exclude_unset=True)
    named = point.targets.split("+") if "+" in point.targets or point.targets.endswith("_proj") else point.targets
    values["peft"] = values.get("peft", {}) | {"r": point.r, "lora_alpha": point.lora_alpha, "target_modules": named}
    values["eval"] = values.get("eval", {}) | {"prompts": []}
    try:
        checked = TrainConfig.model_validate(values)
    except ValueError as error:
        raise ConfigError(f"{point}: {error}") from error
    output = checked.output.model_copy(update={"output_dir": directory / identity(checked)})
    return checked.model_copy(update={"output": output})


def sweep(
    config: TrainConfig, wanted: Sequence[Point], directory: Path, run: Run, told: Callable[[Result], None]
) -> list[Result]:
    """The results of all points, in their order. What is there already is told, too."""
    architecture = architecture_of(read_config(config.model.model_name_or_path))
    plan = [(point, configured(config, point, directory)) for point in wanted]
    for _, each in plan:
        _trained(architecture, each)  # a module that the base does not have is found before the first run
    directory.mkdir(parents=True, exist_ok=True)
    done = {result.key: result for result in read_results(directory / RESULTS)}
    results = []
    for point, each in plan:
        key = each.output.output_dir.name
        if key not in done:
            done[key] = _run(point, each, key, _trained(architecture, each), run)
            _keep(done[key], directory / RESULTS)
            shutil.rmtree(each.output.output_dir, ignore_errors=True)
        results.append(done[key])
        told(done[key])
    return results


def identity(config: TrainConfig) -> str:
    """Of everything but where its output goes, and of the data themselves."""
    values = config.model_dump(mode="json", exclude={"output"})
    try:
        data = [hashlib.sha256(path.read_bytes()).hexdigest() for path in _files(config)]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return hashlib.sha256(json.dumps([values, data], sort_keys=True).encode()).hexdigest()[:16]


def _files(config: TrainConfig) -> Iterator[Path]:
    data = config.data
    yield from (file.path for file in (*data.train, data.eval, data.replay, config.eval.general_set) if file)


def read_results(path: Path) -> Iterator[Result]:
    """A line that a kill cut off is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        try:
            yield Result(**json.loads(line))
        except (ValueError, TypeError):
            continue


def _keep(result: Result, path: Path) -> None:
    with path.open("ab+") as file:
        file.seek(0)
        cut_off = file.read()[-1:] not in (b"", b"\n")
        file.write(b"\n" * cut_off + json.dumps(asdict(result)).encode() + b"\n")


def _run(point: Point, config: TrainConfig, key: str, parameters: int, run: Run) -> Result:
    try:
        base, loss, seconds = run(config)
    except Diverged:
        return Result(key, point.targets, point.r, point.alpha, parameters, None, None, 0.0)
    return Result(key, point.targets, point.r, point.alpha, parameters, base, loss, seconds)


def _trained(architecture: Architecture, config: TrainConfig) -> int:
    return architecture.adapter_parameters(ranks_of(config, architecture))
