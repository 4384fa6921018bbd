"""Where an unfinished run lives: `<output_dir>.run`, with its log and its checkpoints, held by one process at a time.

It goes when the run has ended well: then everything that matters is in the output directory.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.errors import ConfigError
from adapters.train.checkpoints import Checkpoints, identity_of
from adapters.train.config import TrainConfig, with_files
from adapters.train.journal import LOG

if TYPE_CHECKING:
    from adapters.train.state import TrainingState

CONFIG = "config.json"


@dataclass(frozen=True)
class RunDirectory:
    path: Path
    checkpoints: Checkpoints
    identity: Mapping[str, str]
    checkpoint: Path | None
    """Where to go on from."""

    def save(self, state: TrainingState, config: TrainConfig) -> None:
        def write(directory: Path) -> None:
            state.write(directory)
            store_config(config, directory / CONFIG)
            shutil.copyfile(self.path / LOG, directory / LOG)

        self.checkpoints.save(state.step, self.identity, write)

    def remove(self) -> None:
        shutil.rmtree(self.path)


@contextmanager
def opened(config: TrainConfig, identity: Mapping[str, str]) -> Iterator[RunDirectory]:
    """Locked; what a killed predecessor left half written is cleared away, and its log is that of its checkpoint."""
    path = run_path(config.output.output_dir)
    with _locked(path):
        checkpoints = Checkpoints(path / "checkpoints", config.output.save_total_limit)
        _clear_leftovers(config.output.output_dir, checkpoints.directory)
        found = None if config.output.resume == "never" else checkpoints.newest()
        if found is None:
            shutil.rmtree(checkpoints.directory, ignore_errors=True)
            (path / LOG).unlink(missing_ok=True)
        else:
            _refuse_differences(identity_of(found), identity, path)
            shutil.copyfile(found / LOG, path / LOG)
        yield RunDirectory(path, checkpoints, identity, found)


def run_path(output_dir: Path) -> Path:
    return output_dir.with_name(output_dir.name + ".run")


def stored_config(output_dir: Path) -> TrainConfig:
    """The configuration of the unfinished run that was to become `output_dir`."""
    checkpoint = Checkpoints(run_path(output_dir) / "checkpoints", 1).newest()
    if checkpoint is None:
        raise ConfigError(
            f"{output_dir}: no whole checkpoint of an unfinished run in {run_path(output_dir)}, so there is nothing "
            "to go on with; `train run CONFIG.yaml` starts one"
        )
    return TrainConfig.model_validate_json((checkpoint / CONFIG).read_text(encoding="utf-8"))


def store_config(config: TrainConfig, path: Path) -> None:
    """Paths become absolute: who goes on may stand somewhere else."""
    config = with_files(config, Path.absolute)
    model = config.model.model_copy(
        update={
            "model_name_or_path": config.model.model_name_or_path.absolute(),
            "adapter_name_or_path": config.model.adapter_name_or_path and config.model.adapter_name_or_path.absolute(),
        }
    )
    output = config.output.model_copy(update={"output_dir": config.output.output_dir.absolute()})
    whole = config.model_copy(update={"model": model, "output": output})
    path.write_text(whole.model_dump_json(indent=1), encoding="utf-8")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The directory itself is what is locked; it may go while another waits to open it."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ConfigError(
                f"{path}: another run is writing there; wait for it, or choose another output.output_dir"
            ) from None
        if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
            break
        os.close(descriptor)
    try:
        yield
    finally:
        os.close(descriptor)


def _clear_leftovers(output_dir: Path, checkpoints: Path) -> None:
    """Staging directories of a process that was killed; nobody else writes here while the lock is held."""
    for pattern, parent in ((f".{output_dir.name}.????????*", output_dir.parent), (".step-*", checkpoints)):
        for leftover in parent.glob(pattern):
            shutil.rmtree(leftover)


def _refuse_differences(before: Mapping[str, str], now: Mapping[str, str], path: Path) -> None:
    changed = [
        f"  {key}: was {before.get(key, 'not there')}, is {now.get(key, 'not there')}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ConfigError(
            f"{path} holds an unfinished run of another configuration, which cannot go on with this one:\n"
            + "\n".join(changed)
            + "\nPut back what was, or start anew with --set output.resume=never",
            code="run_changed",
        )
