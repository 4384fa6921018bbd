"""FLOW fine-tune, as a job: data files → a training process → the gate → the engine's trial → a version to chat with.

What can be refused without looking into the files is refused at once; everything else is the job's error. The training
process does the work; this side passes on what it says, stops it, and takes in what it leaves.
"""

from __future__ import annotations

import asyncio
import io
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapters.base import BaseModel
from adapters.errors import (
    ConfigError,
    DataError,
    JobCancelled,
    JobLost,
    NotFound,
    NotServable,
    TrainError,
    WouldNotFit,
)
from adapters.file_store import DataFile, FileStore
from adapters.job_records import QUEUED
from adapters.jobs import Job, Jobs
from adapters.registry import Version
from adapters.train.metrics import Metrics, read_metrics
from adapters.upload import UploadOptions
from server import worker_process
from server.admission import Admission
from server.errors import BadRequest, Overloaded, PermissionDenied
from server.fetches import Fetches
from server.fine_tuning_fields import JobFields, read_job, require_configuration, resolve
from server.fine_tuning_layout import ADAPTER, OF_THE_PARENT, Layout
from server.jobs import Run, WorkerDied
from server.resolve import Resolver
from server.settings import Settings
from server.take_in import take_in

KIND = "fine_tune"
WORKER = "adapters.train.worker"
RESULTS = "fine-tune-results"
MAX_QUEUED = 1000
STOPPED = "training_stopped"
"""What it says when somebody else than we sent it a SIGTERM: whoever stops all processes of a service, for example."""
FILES, PARENT = "files", "parent"
STAGES = {
    "validating": "Validating files",
    "training": "Training begun on {train_rows} rows, {held_out_rows} held out",
}
LISTEN_S = 0.5
"""How soon a training process hears that it shall stop."""
STOP_S = 120.0
"""How long it may take to come to the end of its step, and to write down where it is."""
EVENTS = 100
"""Steps of a run that become events; a run of more leaves some out, as few events of a job are kept."""
ERRORS = {kind.code: kind for kind in (ConfigError, DataError, NotServable, WouldNotFit)}
"""Of what the training process says; anything else is a TrainError."""


class FineTuning:
    def __init__(
        self,
        jobs: Jobs,
        files: FileStore,
        resolver: Resolver,
        fetches: Fetches,
        admission: Admission,
        base: BaseModel,
        settings: Settings,
    ) -> None:
        self._jobs = jobs
        self._files = files
        self._resolver = resolver
        self._fetches = fetches
        self._admission = admission
        self._base = base
        self._settings = settings
        self._layout = Layout(files, base, settings)
        self._root = settings.data_dir.absolute() / "fine-tuning"

    def ask(self, body: Mapping[str, Any], by: str) -> Job:
        """A new job. Raises what is known to be wrong already."""
        if not self._settings.fine_tuning:
            raise PermissionDenied("fine-tuning is switched off here (fine_tuning)", code="fine_tuning_off")
        fields = read_job(body)
        parent = self._resolver.resolve(fields.model).version
        own = {} if parent is None else {PARENT: {"ref": parent.ref, "digest": parent.digest}}
        if parent is not None and (taken := sorted(set(fields.wanted.own) & OF_THE_PARENT)):
            raise BadRequest(
                f"hyperparameters.{taken[0]}: {parent.ref} is trained further, whose own stays; leave it out, or train "
                f"{self._base.name!r}",
                param=f"hyperparameters.{taken[0]}",
                code="bad_hyperparameters",
            )
        files = self._layout.require_files(fields)
        require_configuration(self._layout.sections("ft-x", fields, files, resolve(fields.wanted, 1)))
        if self._jobs.count(QUEUED, [KIND]) >= MAX_QUEUED:
            raise Overloaded(f"{MAX_QUEUED} fine-tuning jobs wait already; try again when some have ended")
        kept = {param: asdict(file) for param, file in files.items()}
        params = {**fields.model_dump(mode="json", exclude_unset=True), FILES: kept, **own}
        return self._jobs.create(KIND, params, by=by)

    async def work(self, run: Run) -> Mapping[str, Any]:
        fields = asked(run.job)
        directory = self._directory(run.job)
        parent = run.job.params.get(PARENT)
        adapter = None if parent is None else await self._fetches.path(parent["digest"])
        job = adapter_name(run.job), fields, given_files(run.job)
        hyperparameters = await asyncio.to_thread(self._layout.lay_out, directory, *job, adapter)
        run.report(hyperparameters=hyperparameters)
        if not (directory / ADAPTER).exists():
            await self._train(run, directory)
        metrics = await asyncio.to_thread(read_metrics, directory / ADAPTER)
        version, created = await self._admit(run, directory / ADAPTER)
        table = io.BytesIO(metrics.table.encode())
        results = await asyncio.to_thread(self._files.create, table, "step_metrics.csv", RESULTS, by=run.job.created_by)
        await asyncio.to_thread(run.event, f"New fine-tuned model created: {version.adapter}")
        return _result(version, created, metrics, results, hyperparameters)

    def ended(self, job: Job) -> None:
        """What it needed on the disk may go."""
        if job.kind == KIND and job.has_ended:
            shutil.rmtree(self._directory(job), ignore_errors=True)

    def sweep(self) -> None:
        """Remove what jobs left that a crash kept from clearing up."""
        for directory in self._root.iterdir() if self._root.exists() else ():
            try:
                self.ended(self._jobs.job(directory.name))
            except NotFound:
                shutil.rmtree(directory, ignore_errors=True)

    def _directory(self, job: Job) -> Path:
        return self._root / job.id

    async def _train(self, run: Run, directory: Path) -> None:
        limits = (self._settings.fine_tuning_memory_bytes, self._settings.fine_tuning_threads)
        async with worker_process.running(WORKER, "training", directory, *limits) as process:
            try:
                while (message := await process.heard(LISTEN_S)) is not None:
                    await _pass_on(run, message)
            except (JobCancelled, JobLost):
                raise
            except TrainError:
                raise
            except Exception:  # it is put aside, or the server stops: what is done shall not be lost
                await process.stop(STOP_S)
                raise
            if not (directory / ADAPTER).exists():
                raise WorkerDied(process.how_it_ended())

    async def _admit(self, run: Run, directory: Path) -> tuple[Version, bool]:
        parents = [run.job.params[PARENT]["ref"]] if PARENT in run.job.params else []
        data_digest = f"sha256:{given_files(run.job)['training_file'].sha256}"
        lineage = {"run": public_id(run.job), "data_digest": data_digest, "parents": parents}
        options = UploadOptions(by=run.job.created_by, lineage=lineage)
        return await take_in(self._admission, run, adapter_name(run.job), directory, options)


def public_id(job: Job) -> str:
    """As OpenAI's ids look: `ftjob-…`."""
    return f"ft{job.id}"


def adapter_name(job: Job) -> str:
    """Of what the job makes: the suffix, and the end of the job's id."""
    suffix = job.params.get("suffix")
    return "-".join(part for part in ("ft", suffix, job.id[-8:]) if part)


def asked(job: Job) -> JobFields:
    return read_job({key: value for key, value in job.params.items() if key not in (FILES, PARENT)})


def given_files(job: Job) -> dict[str, DataFile]:
    """`training_file` and perhaps `validation_file`, as they were when the job was made."""
    return {param: DataFile(**file) for param, file in job.params[FILES].items()}


async def _pass_on(run: Run, message: Mapping[str, Any]) -> None:
    """Raises what the job must end with."""
    progress = dict(run.progress)
    if (error := message.get("error")) is not None:
        if error["code"] == STOPPED:
            raise WorkerDied("the training process was told to stop")
        raise ERRORS.get(error["code"], TrainError)(error["message"], code=error["code"])
    if (stage := message.get("stage")) is not None:
        run.report(**{**progress, **message})  # before its event: a job is never behind what its events say
        await asyncio.to_thread(run.event, STAGES[stage].format(**message))
    elif (step := message.get("step")) is not None:
        number, total = step["step"], message["total_steps"]
        figures = {"step": number, "total_steps": total, "train_loss": step["loss"]}
        finish = time.time() + (total - number) * step["seconds"]
        run.report(**{**progress, **figures, "estimated_finish": int(finish)})
        if number % max(1, -(-total // EVENTS)) == 0 or number == total:
            text = f"Step {number}/{total}: training loss={step['loss']:.3f}"
            await asyncio.to_thread(lambda: run.event(text, **figures))
    else:
        run.report(**progress)


def _result(
    version: Version, created: bool, metrics: Metrics, results: DataFile, hyperparameters: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "name": version.adapter,
        "version": version.number,
        "digest": version.digest,
        "state": version.state,
        "created": created,
        "steps": metrics.steps,
        "trained_tokens": metrics.trained_tokens,
        "train_loss": metrics.train_loss,
        "valid_loss": metrics.valid_loss,
        "result_files": [results.id],
        "hyperparameters": dict(hyperparameters),
    }
