"""What becomes of an engine that was decided on: its job ends → requests go there → measured → kept, or rolled back.

Follows the stories that this server has begun, finds engines that a person wanted, and takes up what stood when the
process before ended. It decides nothing about popularity.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

from adapters.errors import AdapterError, NotFound, Unfaithful
from adapters.job_records import CANCELLED as JOB_CANCELLED
from adapters.job_records import SUCCEEDED, Job
from adapters.jobs import Jobs
from adapters.promotions import (
    ADVISED,
    BUILDING,
    BY_HAND,
    BY_POLICY,
    CANCELLED,
    DEMOTED,
    FAILED,
    MEASURING,
    REFUSED,
    ROLLED_BACK,
    SERVING,
    Promotion,
)
from adapters.registry import Version
from server.engine.merged import MergedEngine, MergedEngines
from server.errors import ServerError
from server.promotion_figures import conditions_of, judge
from server.promotion_ledger import Ledger
from server.resolve import engine_name
from server.settings import Settings
from server.traffic import Traffic

log = logging.getLogger(__name__)

MEASURE_S = 600.0
"""How long requests are waited for after a switch; then what there is must do."""
Mode = Literal["off", "advise", "auto"]
Begin = Callable[[Version, Mapping[str, Any]], Job]
"""Gives a version its engine, as a durable job: merges, checks, builds, switches. Raises what is known to be wrong. The
second is how it was asked for before; nothing: as it is served."""
Asked = Callable[[str], Mapping[str, Any]]
"""Engine name → how it was asked for, where a job built it."""


class Course:
    def __init__(
        self,
        ledger: Ledger,
        traffic: Traffic,
        merged: MergedEngines,
        begin: Begin,
        asked: Asked,
        jobs: Jobs,
        settings: Settings,
    ) -> None:
        self._ledger = ledger
        self._traffic = traffic
        self._merged = merged
        self._job_for = begin
        self._asked = asked
        self._telling = asyncio.Lock()
        """Whoever looks for engines without a story sees none whose story is just ending, or beginning."""
        self._jobs = jobs
        self._mode: Mode = settings.promotion
        self._requests = settings.promotion_requests
        self._least_speedup = settings.promotion_speedup
        self._conditions = conditions_of(settings)
        self._going: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Whoever is waited for ends with the engines."""
        for task in self._going:
            task.cancel()
        if self._going:
            await asyncio.wait(list(self._going))

    async def resume(self) -> None:
        """Engines do not outlive the process. A job that was under way goes on by itself."""
        for story in await self._ledger.live():
            if story.state in (MEASURING, SERVING) or (story.state == BUILDING and await self._is_built(story)):
                await self._build_again(story)

    async def begin(self, version: Version, reason: str, figures: Any) -> None:
        try:
            job = await asyncio.to_thread(self._job_for, version, {})
        except (ServerError, AdapterError) as error:
            story = await self._ledger.begin(version, BUILDING, reason, figures=figures)
            await self._ledger.change(story, f"{error.message} ({error.code})", FAILED)
            return
        await self._ledger.begin(version, BUILDING, reason, job=job.id, figures=figures)

    async def end(self, story: Promotion, reason: str, state: str = DEMOTED, **more: Any) -> None:
        """Requests go by LoRA at once; those that run there are waited for elsewhere."""
        version = await self._ledger.version(story.ref)
        async with self._telling:
            await self._ledger.change(story, reason, state, **more)
            if version is not None:
                self._demote(engine_name(version))
                await asyncio.sleep(0)  # it is on its way out before anybody looks again

    async def follow(self, story: Promotion) -> None:
        if story.state == BUILDING:
            await self._follow_job(story)
        elif story.state in (MEASURING, SERVING):
            version = await self._ledger.servable(story.ref)
            engine = None if version is None else self._merged.find(engine_name(version))
            if engine is None or engine.state in ("failed", "draining"):
                await self._lost(story, version, engine)
            elif "measured" not in story.figures and story.id in self._ledger.switched:
                await self._measure(story)

    async def find_those_by_hand(self) -> None:
        async with self._telling:
            known = {story.ref for story in await self._ledger.live() if story.state != ADVISED}
            for name, engine in self._merged.snapshot().items():
                version = await self._ledger.version_of(name)
                if version is not None and engine.state == "ready" and version.ref not in known:
                    reason = f"{version.ref} was promoted by hand"
                    told = {"origin": BY_HAND, "figures": {"asked": dict(self._asked(name))}}
                    story = await self._ledger.begin(version, SERVING, reason, **told)
                    self._ledger.switched[story.id] = engine.since or self._ledger.clock()

    async def end_orphans(self) -> None:
        """Engines whose version another server took out of service; what this one takes out it ends itself."""
        for name, engine in self._merged.snapshot().items():
            if engine.since and engine.state != "draining":
                version = await self._ledger.version_of(name)
                if version is None or await self._ledger.servable(version.ref) is None:
                    self._demote(name)

    async def _follow_job(self, story: Promotion) -> None:
        assert story.job is not None
        try:
            job = await asyncio.to_thread(self._jobs.job, story.job)
        except NotFound:
            await self._ledger.change(story, "its job is not known any more", FAILED)
            return
        if job.state == SUCCEEDED:
            await self._switch(story, job)
        elif job.state == JOB_CANCELLED:
            await self._ledger.change(story, "its job was cancelled", CANCELLED)
        elif job.has_ended:
            error = job.error or {}
            told = f"{error.get('message', 'its job failed')} ({error.get('code')})"
            await self._ledger.change(story, told, REFUSED if error.get("code") == Unfaithful.code else FAILED)

    async def _switch(self, story: Promotion, job: Job) -> None:
        """Since the end of the job requests go to the engine."""
        version = await self._ledger.servable(story.ref)
        engine = None if version is None else self._merged.find(engine_name(version))
        if engine is None or engine.since is None or not self._merged.serves(engine.name):
            await self._ledger.change(story, "its engine was built, and is gone already", FAILED)
            return
        self._ledger.switched[story.id] = engine.since
        result = job.result or {}
        figures: dict[str, Any] = {"build_s": round(engine.build_s or 0.0, 2)}
        figures |= {name: result[name] for name in ("fidelity", "planned_bytes") if name in result}
        was_kept = "measured" in story.figures
        then = "it was measured before" if was_kept else f"its first {self._requests} requests are measured"
        told = f"its engine was built in {engine.build_s or 0.0:.1f} s and answers now; {then}"
        await self._ledger.change(story, told, SERVING if was_kept else MEASURING, figures=figures)

    async def _measure(self, story: Promotion) -> None:
        switched_at = self._ledger.switched[story.id]
        must = self._ledger.clock() - switched_at >= MEASURE_S
        wanted = 0 if must else self._requests
        verdict = judge(self._traffic, story.ref, switched_at, wanted, self._least_speedup, self._conditions)
        if verdict is None:
            return
        if verdict.keeps or story.origin == BY_HAND:
            await self._ledger.change(story, verdict.reason, SERVING, figures=verdict.figures)
            self._ledger.kept()
        else:
            await self.end(story, verdict.reason, ROLLED_BACK, figures=verdict.figures)

    async def _lost(self, story: Promotion, version: Version | None, engine: MergedEngine | None) -> None:
        if version is None:
            await self._ledger.change(story, "its version is out of service", DEMOTED)
        elif engine is not None and engine.state == "failed":
            told = f"its engine was given up: {engine.pool.reason}"
            if story.origin == BY_POLICY:
                await self.end(story, told, FAILED)  # it holds a place
            else:
                await self._ledger.change(story, told, FAILED)
        else:
            state = DEMOTED if story.origin == BY_HAND else CANCELLED
            await self._ledger.change(story, "its engine was taken back by hand", state)

    async def _build_again(self, story: Promotion) -> None:
        version = await self._ledger.servable(story.ref)
        if version is None:
            await self._ledger.change(story, "its version is out of service", DEMOTED)
        elif story.origin == BY_POLICY and self._mode != "auto":
            await self._ledger.change(story, f"the server was started anew, with promotion = {self._mode}", DEMOTED)
        else:
            try:
                job = await asyncio.to_thread(self._job_for, version, story.figures.get("asked", {}))
            except (ServerError, AdapterError) as error:
                await self._ledger.change(story, f"it was not built again: {error.message} ({error.code})", FAILED)
                return
            again = "the server was started anew; its engine is built again"
            await self._ledger.change(story, again, BUILDING, job=job.id)

    async def _is_built(self, story: Promotion) -> bool:
        with contextlib.suppress(NotFound):
            return story.job is not None and (await asyncio.to_thread(self._jobs.job, story.job)).state == SUCCEEDED
        return False

    def _demote(self, name: str) -> None:
        task = asyncio.create_task(self._merged.demote(name))
        self._going.add(task)
        task.add_done_callback(self._gone)

    def _gone(self, task: asyncio.Task[None]) -> None:
        self._going.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("falling back from a merged engine failed", exc_info=error)
