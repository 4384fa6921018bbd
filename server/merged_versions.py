"""FLOW merged engine, as a job: a version merged and measured → an engine of the result → its requests switch.

    planning → merging → verifying → waiting (for the base engine, or another build) → building → warming → ready

The merged weights lie in `data_dir/merged` for as long as an engine or a job needs them. What is known not to fit is
refused at once. It decides nothing: who asks is a person, or whatever watches the traffic.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adapters.base import BaseModel
from adapters.errors import AdapterError, JobCancelled, JobLost, NotFound
from adapters.file_store import FileStore
from adapters.jobs import Job, Jobs
from adapters.merge.orders import ExportOrder
from adapters.records import MERGE_ONLY, READY
from adapters.registry import Registry, Version
from server import merge_only, merged_weights
from server.data_files import VALIDATION, require_data, rows_of
from server.engine.memory_plan import plan_of_merge
from server.engine.merged import MergedEngine, MergedEngines
from server.errors import AdapterUnavailable, BadRequest, EngineUnavailable, ServerError
from server.jobs import Run
from server.mergeable import keep_report, require_merging
from server.merged_orders import NF4, Quantization, Values, order_of, stored_as
from server.merging import Merging
from server.resolve import engine_name
from server.settings import Settings

log = logging.getLogger(__name__)

KIND = "merged_engine"
HOW = ("base", "quantization", "accept_loss", VALIDATION)
"""Of a job's parameters, what its engine was asked for with."""


class MergedVersions:
    def __init__(
        self,
        jobs: Jobs,
        registry: Registry,
        files: FileStore,
        merging: Merging,
        merged: MergedEngines,
        base: BaseModel,
        settings: Settings,
        server: str,
    ) -> None:
        self._jobs = jobs
        self._registry = registry
        self._files = files
        self._merging = merging
        self._merged = merged
        self._base = base
        self._settings = settings
        self._server = server
        self._roots = settings.data_dir.absolute() / "merged"
        self._root = self._roots / server  # another server on this directory would sweep what is in use here
        self._asked: dict[str, Mapping[str, Any]] = {}
        self._wanted: Counter[str] = Counter()
        self._sweeping: set[asyncio.Task[None]] = set()
        merged.on_gone = self.sweep_soon
        self.alone = asyncio.Lock()
        """Held by whoever moves an alias or takes an engine back: no alias moves to an engine that is going."""

    def ask(
        self,
        version: Version,
        values: Values,
        by: str | None,
        *,
        quantization: Quantization | None = None,
        accept_loss: bool = False,
        validation_file: str | None = None,
    ) -> Job:
        """A job, or the one that is under way for this version. Raises what is known to be wrong already.

        `quantization`: None is what the settings say. `accept_loss`: take the merge however far it is from its adapter.
        `validation_file`: rows on which that is measured; without them on chats of ours.
        """
        require_merging(self._settings)
        _require_servable(version)
        if (job := self._under_way(version)) is not None:
            return job
        quantization = quantization or self._settings.merged_quantization
        stored = stored_as(quantization, self._settings)
        self.require_room(quantization, engine_name(version))
        params = {"name": version.adapter, "version": version.number, "digest": version.digest}
        how = {"base": values, "quantization": quantization, "dtype": stored, "accept_loss": accept_loss}
        how |= self._named(validation_file)
        return self._jobs.create(KIND, {**params, **how}, by=by, server=self._server)

    def require_room(self, quantization: Quantization, name: str = "") -> None:
        """Raises MergedEngineRefused where an engine, for `name` or for anybody, could not be built now."""
        plan = plan_of_merge(self._base, self._settings, quantised=quantization == NF4)
        self._merged.require_room(name, plan)

    def asked(self, name: str) -> Mapping[str, Any]:
        """How the engine of this name was asked for, for `ask_again`; nothing where it was built by no job."""
        return self._asked.get(name, {})

    def ask_again(self, version: Version, asked: Mapping[str, Any], by: str) -> Job:
        """Also where its rows were deleted since: then it is measured on chats of ours."""
        how = {name: asked[name] for name in HOW if name in asked}
        values, rows = how.pop("base", "served"), how.pop(VALIDATION, None)
        with suppress(BadRequest):
            how |= self._named(rows)
        return self.ask(version, values, by, **how)

    def answers(self, version: Version) -> bool:
        """Whether its engine answers now: then an alias may move to a version that is merge only."""
        return self._merged.answers(engine_name(version))

    def why_not(self, version: Version, alias: str | None) -> ServerError | None:
        """Of a version that is merge only: why no engine of it answers here. None: one does, or will by itself."""
        if self._merged.serves(name := engine_name(version)):
            return None
        return merge_only.why_not(version, alias, self._merged.find(name), self._under_way(version))

    def standing(self, version: Version) -> MergedEngine | None:
        """Its engine, where it has one that is up, or will be again by itself."""
        engine = self._merged.find(engine_name(version))
        return engine if engine is not None and engine.since and self._merged.serves(engine.name) else None

    def engine(self, version: Version) -> MergedEngine:
        """In any state. Raises NotFound where it has none."""
        found = self._merged.find(engine_name(version))
        if found is None:
            raise NotFound(f"{version.ref} has no merged engine", code="no_merged_engine")
        return found

    async def fall_back(
        self, version: Version, by: str | None, *, force: bool = False
    ) -> tuple[Job | None, asyncio.Task[None]]:
        """New requests take the LoRA path at once. What is under way for it, asked to stop; and a task that ends when
        its engine, if it has one, is gone. Raises Conflict, unless with `force`, where an alias needs the engine."""
        async with self.alone:
            if not force:
                await asyncio.to_thread(merge_only.require_unaliased, self._registry, version)
            job = await asyncio.to_thread(self._under_way, version)
            if job is not None:
                job = await asyncio.to_thread(self._jobs.cancel, job.id, by=by)
            ending = asyncio.create_task(self._merged.demote(engine_name(version)))
            await asyncio.sleep(0)  # it is on its way out before anybody moves an alias
            return job, ending

    async def work(self, run: Run) -> Mapping[str, Any]:
        params = run.job.params
        version = await self._servable(params)
        with self._wants(key := merged_weights.key(params)):
            made = await self._merge(run, version, self._root / key)
            await self._servable(params)
            self._asked[engine_name(version)] = {name: params[name] for name in HOW if name in params}
            engine = await self._promote(run, engine_name(version), self._root / key)
            try:
                await self._servable(params)  # whoever took it out of service before there was an engine saw none
            except (AdapterError, ServerError):
                await self._merged.demote(engine.name)
                raise
        await asyncio.to_thread(run.event, "requests go there now", build_s=engine.build_s)
        return {
            "name": version.adapter,
            "version": version.number,
            "build_s": engine.build_s,
            "planned_bytes": engine.plan.total,
            "values": made["values"],
            "fidelity": made["fidelity"],
        }

    def ended(self, job: Job) -> None:
        """What it needed on the disk may go, unless an engine uses it now."""
        if job.kind == KIND:
            self.sweep_soon()

    def sweep_soon(self) -> None:
        task = asyncio.create_task(self.sweep())
        self._sweeping.add(task)  # kept: the loop holds tasks weakly
        task.add_done_callback(self._sweeping.discard)

    async def sweep(self) -> None:
        """Merged weights that no engine and no job needs go, and what a crash left of some."""
        wanted = await asyncio.to_thread(self._wanted_by_jobs)
        going = []
        for path in merged_weights.left(self._roots, self._root):
            used = {engine.directory for engine in self._merged.snapshot().values()}
            key = merged_weights.key_of(path)
            if path not in used and (key is None or not (key in wanted or self._wanted[key])):
                # renamed before anybody else has the word: a job sees all of it, or nothing
                going.append(merged_weights.aside(path))
        for path in going:
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)

    def forget(self, server: str) -> None:
        """One that shared this directory, perhaps, does not come back."""
        shutil.rmtree(self._roots / server, ignore_errors=True)

    async def close(self) -> None:
        if self._sweeping:
            await asyncio.wait(list(self._sweeping))

    async def _servable(self, params: Mapping[str, Any]) -> Version:
        version = await asyncio.to_thread(self._registry.resolve, params["name"], params["digest"])
        _require_servable(version)
        return version

    async def _merge(self, run: Run, version: Version, destination: Path) -> Mapping[str, Any]:
        self._root.mkdir(parents=True, exist_ok=True)
        adapter = str(await self._merging.adapter(run.job, version.ref, version.digest))
        rows = await asyncio.to_thread(self._rows, run.job)
        order = order_of(
            run.job.params, self._merging.place, adapter, destination, self._merging.out(run.job), rows, self._settings
        )
        done = await self._merging.carry_out(run, order)
        if isinstance(order, ExportOrder):
            done = done["report"]
            await asyncio.to_thread(merged_weights.put, self._merging.out(run.job), destination)
        await asyncio.to_thread(keep_report, self._registry, version.ref, done)
        return done

    def _named(self, validation_file: str | None) -> dict[str, Any]:
        """Raises BadRequest for a file that is not there."""
        if validation_file is None:
            return {}
        return {VALIDATION: require_data(self._files, VALIDATION, validation_file).id}

    def _rows(self, job: Job) -> tuple[str, ...]:
        return rows_of(self._files, VALIDATION, job.params.get(VALIDATION), self._merging.beside(job, VALIDATION))

    async def _promote(self, run: Run, name: str, directory: Path) -> MergedEngine:
        try:
            return await self._merged.promote(name, directory, lambda state: run.report(stage=state))
        except (JobCancelled, JobLost):
            await self._merged.demote(name)
            raise
        except EngineUnavailable:
            run.report(**run.progress)  # raises where it fell back because it was asked to stop
            raise

    def _under_way(self, version: Version) -> Job | None:
        for job in self._open_jobs():
            if job.params["digest"] == version.digest and job.params["name"] == version.adapter:
                return job
        return None

    def _open_jobs(self) -> list[Job]:
        """This server's; those of an older release are anybody's."""
        return [job for job in self._jobs.open_jobs(KIND) if job.server in (None, self._server)]

    def _wanted_by_jobs(self) -> set[str]:
        return {merged_weights.key(job.params) for job in self._open_jobs()}

    @contextmanager
    def _wants(self, key: str) -> Iterator[None]:
        self._wanted[key] += 1
        try:
            yield
        finally:
            self._wanted[key] -= 1


def _require_servable(version: Version) -> None:
    if version.state not in (READY, MERGE_ONLY):
        raise AdapterUnavailable(
            f"adapter {version.ref} is {version.state}; only one that is ready, or merge only, can have an engine",
            code=f"adapter_{version.state}",
        )
