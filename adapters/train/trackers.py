"""Experiment trackers beside the log: TensorBoard and MLflow, imported when a configuration names them.

A tracker gets every figure that the log gets. What it cannot do never loses a run its log.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from adapters.errors import ConfigError
from adapters.train.config import TrainConfig

Tracker = Callable[[int, Mapping[str, float]], None]
"""Step, and figures by name."""
PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow-skinny"}
EXPERIMENT = "loraplex"
LONGEST_PARAMETER = 500


@contextmanager
def tracked(config: TrainConfig) -> Iterator[Sequence[Tracker]]:
    """Open until the block ends. Raises ConfigError where one that is asked for is not installed."""
    with ExitStack() as opened:
        yield [opened.enter_context(KINDS[name](config)) for name in config.output.report_to if name in KINDS]


def require_installed(names: Sequence[str]) -> None:
    for name in names:
        if name in PACKAGES and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"output.report_to: {name} is not installed here; `pip install {PACKAGES[name]}`, or leave it out: "
                "log.jsonl has every figure"
            )


@contextmanager
def _tensorboard(config: TrainConfig) -> Iterator[Tracker]:
    require_installed(["tensorboard"])
    from torch.utils.tensorboard import SummaryWriter

    directory = config.output.output_dir.with_name(config.output.output_dir.name + ".tensorboard")
    with SummaryWriter(str(directory)) as writer:

        def track(step: int, figures: Mapping[str, float]) -> None:
            for name, value in figures.items():
                writer.add_scalar(name, value, step)

        yield track


@contextmanager
def _mlflow(config: TrainConfig) -> Iterator[Tracker]:
    require_installed(["mlflow"])
    import mlflow

    mlflow.set_experiment(EXPERIMENT)
    with mlflow.start_run(run_name=config.output.name):
        mlflow.log_params(dict(_flat(config.model_dump(mode="json"))))

        def track(step: int, figures: Mapping[str, float]) -> None:
            mlflow.log_metrics(dict(figures), step=step)

        yield track


KINDS: Mapping[str, Callable[[TrainConfig], Any]] = {"tensorboard": _tensorboard, "mlflow": _mlflow}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value)[:LONGEST_PARAMETER]
