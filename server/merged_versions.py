"""FLOW merged engine, as a job: a version merged and measured → an engine of the result → its requests switch.

    planning → merging → verifying → waiting (for the base engine, or another build) → building → warming → ready

What is known not to fit is refused at once. It decides nothing: who asks is a person, or whatever watches the traffic.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from adapters.base import BaseModel
from adapters.errors import JobCancelled, JobLost, NotFound
from adapters.job_records import QUEUED, RUNNING
from adapters.jobs import Job, Jobs
from adapters.merge.bases import Asked
from adapters.records import MERGE_ONLY, READY
from adapters.registry import Registry, Version
from server.engine.memory_plan import plan_of_merge
from server.engine.merged import MergedEngine, MergedEngines
from server.errors import AdapterUnavailable, EngineUnavailable
from server.jobs import Run
from server.merge_fields import Budget
from server.merges import Merges, require_merging
from server.resolve import engine_name
from server.settings import Settings

log = logging.getLogger(__name__)

KIND = "merged_engine"
Values = Literal["served", "auto", "dequantized", "original"]
"""Which values of the base: `served` are those that the base engine computes with."""


class MergedVersions:
    def __init__(
        self,
        jobs: Jobs,
        registry: Registry,
        merges: Merges,
        merged: MergedEngines,
        base: BaseModel,
        settings: Settings,
    ) -> None:
        self._jobs = jobs
        self._registry = registry
        self._merges = merges
        self._merged = merged
        self._base = base
        self._settings = settings

    def ask(self, version: Version, values: Values, by: str | None, *, accept_loss: bool = False) -> Job:
        """A job, or the one that is under way for this version. Raises what is known to be wrong already.

        `accept_loss`: take the merge however far it is from its adapter.
        """
        require_merging(self._settings)
        if version.state not in (READY, MERGE_ONLY):
            raise AdapterUnavailable(
                f"adapter {version.ref} is {version.state}; only one that is ready, or merge only, can have an engine",
                code=f"adapter_{version.state}",
            )
        if (job := self._under_way(version)) is not None:
            return job
        self._merged.require_room(engine_name(version), plan_of_merge(self._base, self._settings))
        params = {"name": version.adapter, "version": version.number, "digest": version.digest}
        how = {"base": values, "dtype": self._settings.dtype, "accept_loss": accept_loss}
        return self._jobs.create(KIND, {**params, **how}, by=by)

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

    def cancel(self, version: Version, by: str | None) -> Job | None:
        """What is under way for it, asked to stop."""
        job = self._under_way(version)
        return None if job is None else self._jobs.cancel(job.id, by=by)

    async def fall_back(self, version: Version) -> None:
        """New requests take the LoRA path at once; returns when its engine, if it has one, is gone."""
        await self._merged.demote(engine_name(version))

    async def work(self, run: Run) -> Mapping[str, Any]:
        params = run.job.params
        version = await asyncio.to_thread(self._registry.resolve, params["name"], params["digest"])
        name = engine_name(version)
        budget = Budget(accept_loss=params["accept_loss"])
        made = await self._merges.merged(run, version, self._values(params["base"]), params["dtype"], budget)
        try:
            engine = await self._merged.promote(name, Path(made["directory"]), lambda state: run.report(stage=state))
        except (JobCancelled, JobLost):
            await self._merged.demote(name)
            raise
        except EngineUnavailable:
            run.report(**run.progress)  # raises where it fell back because it was asked to stop
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

    def _values(self, asked: Values) -> Asked:
        if asked != "served":
            return asked
        return "dequantized" if self._settings.quantization == "nf4" else "original"

    def _under_way(self, version: Version) -> Job | None:
        for state in (RUNNING, QUEUED):
            for job in self._jobs.jobs(state=state, kind=KIND):
                if job.params["digest"] == version.digest and job.params["name"] == version.adapter:
                    return job
        return None
