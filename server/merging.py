"""The process that merges, combines and exports, for whichever job needs it: one at a time, each in a directory of its
own, where a later attempt takes up what a kill left. It knows no HTTP and not what becomes of the result.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from adapters.base import BaseModel
from adapters.errors import NotFound
from adapters.jobs import Job, Jobs
from adapters.merge.orders import BasePlace, Order, write_order
from server import worker_process
from server.fetches import Fetches
from server.jobs import Run, WorkerDied
from server.settings import Settings

log = logging.getLogger(__name__)

WORKER = "adapters.merge.worker"
KINDS = ("merge", "export", "merged_engine")
"""Of jobs that work here."""
OUT, DONE = "out", "done.json"
LISTEN_S = 0.5
"""How soon the process hears that it shall stop."""


class Merging:
    def __init__(self, jobs: Jobs, fetches: Fetches, base: BaseModel, settings: Settings) -> None:
        self._jobs = jobs
        self._fetches = fetches
        self._settings = settings
        self._root = settings.data_dir.absolute() / "merging"
        self._turn = asyncio.Lock()
        self.base = base
        self.place = BasePlace.of(base, settings.data_dir / "fingerprints")

    def out(self, job: Job) -> Path:
        """Where the process puts what it makes."""
        return self._directory(job) / OUT

    def beside(self, job: Job, name: str) -> Path:
        """A place for something else that the job needs for as long as it lasts."""
        return self._directory(job) / name

    async def adapter(self, job: Job, ref: str, digest: str) -> Path:
        """The files of a version under its name, by other names for the same bytes: nobody takes them from the job."""
        destination = self._directory(job) / "adapters" / ref
        if not destination.exists():
            await asyncio.to_thread(_link_all, await self._fetches.path(digest), destination)
        return destination

    async def carry_out(self, run: Run, order: Order) -> Mapping[str, Any]:
        """What the process says of it in the end. Raises what it refuses with, or WorkerDied."""
        directory = self._directory(run.job)
        if (directory / DONE).exists():
            told: dict[str, Any] = json.loads((directory / DONE).read_text(encoding="utf-8"))
            return told
        await asyncio.to_thread(write_order, directory, order)
        async with self._its_turn(run):
            done = await self._heard_to_the_end(run, directory)
        part = directory / f"{DONE}.part"
        part.write_text(json.dumps(done), encoding="utf-8")
        part.rename(directory / DONE)
        return done

    def ended(self, job: Job) -> None:
        """What it needed on the disk may go."""
        if job.kind in KINDS and job.has_ended:
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

    @asynccontextmanager
    async def _its_turn(self, run: Run) -> AsyncIterator[None]:
        while self._turn.locked():
            run.report(stage="waiting")
            await asyncio.sleep(LISTEN_S)
        async with self._turn:
            yield

    async def _heard_to_the_end(self, run: Run, directory: Path) -> Mapping[str, Any]:
        limits = (self._settings.merge_memory_bytes, self._settings.merge_threads)
        async with worker_process.running(WORKER, "merging", directory, *limits) as process:
            while (message := await process.heard(LISTEN_S)) is not None:
                if "error" in message:
                    raise worker_process.error_of(message["error"])
                if "done" in message:
                    done: Mapping[str, Any] = message["done"]
                    return done
                await _pass_on(run, message)
            raise WorkerDied(process.how_it_ended())


async def _pass_on(run: Run, message: Mapping[str, Any]) -> None:
    stage, before = message.get("stage"), run.progress.get("stage")
    run.report(**(message or run.progress))
    if stage not in (None, before):
        await asyncio.to_thread(run.event, stage)


def _link_all(source: Path, destination: Path) -> None:
    part = destination.with_name(destination.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for path in source.iterdir():
        try:
            os.link(path, part / path.name)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, part / path.name)
    part.rename(destination)
