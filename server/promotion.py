"""Promotions: watch → decide → have it merged, checked and built, as a job → switch → measure → keep or roll back.

`look` is one round, every few seconds. It never stands in the way of a request: what takes long is a job, or a task of
its own. Engines do not outlive the process, stories do: what stood when the server went down is built again at the next
start, for it was earned, or wanted by a person. What was promoted by hand is told of, and never taken back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from adapters.jobs import Jobs
from adapters.promotions import ADVISED, BUILDING, BY_HAND, MEASURING, WITHDRAWN, Promotion
from adapters.records import READY
from server.engine.merged import MergedEngines
from server.errors import MergedEngineRefused
from server.promotion_course import Asked, Begin, Course, Mode
from server.promotion_figures import KNOWN_S, conditions_of, measured_speedup, past_of, predict
from server.promotion_ledger import Ledger
from server.promotion_policy import Decision, Memory, Rules, Situation, Standing, decide
from server.settings import Settings
from server.traffic import Traffic

log = logging.getLogger(__name__)

LOOK_S = 5.0


class Promoter:
    """`begin` makes the job that gives a version its engine, `asked` says how the one of a name was asked for. `room`
    raises MergedEngineRefused while one more would not fit into the memory."""

    def __init__(
        self,
        settings: Settings,
        traffic: Traffic,
        ledger: Ledger,
        merged: MergedEngines,
        jobs: Jobs,
        *,
        begin: Begin,
        asked: Asked = lambda _: {},
        room: Callable[[], None],
    ) -> None:
        self.mode: Mode = settings.promotion
        self.rules = rules_of(settings)
        self._conditions = conditions_of(settings)
        self._traffic = traffic
        self._ledger = ledger
        self._course = Course(ledger, traffic, merged, begin, asked, jobs, settings)
        self._merged = merged
        self._room = room
        self._memory = Memory()
        self._rounds: asyncio.Task[None] | None = None
        self.decisions: Sequence[Decision] = ()
        """Of the last look."""

    async def open(self) -> None:
        await self._course.resume()
        self._rounds = asyncio.create_task(self._go_round())

    async def close(self) -> None:
        if self._rounds is not None:
            self._rounds.cancel()
            await asyncio.wait([self._rounds])
        await self._course.close()

    async def write_down(self) -> None:
        """What a person had built, now: from then on a restart builds it again."""
        await self._course.find_those_by_hand()

    async def look(self) -> None:
        for story in await self._ledger.live():
            await self._course.follow(story)
        await self._course.end_orphans()
        await self._course.find_those_by_hand()
        live = await self._ledger.live()
        if self.mode != "off":
            self.decisions, self._memory = decide(await self._situation(live), self._memory, self.rules)
        await self._withdraw(live)
        if self.mode == "auto":
            await self._act(live)
        elif self.mode == "advise":
            await self._advise(live)

    async def _go_round(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look()
            except Exception:  # a database that is away for a moment must not end all promotions to come
                log.exception("looking after promotions failed")

    async def _situation(self, live: Sequence[Promotion]) -> Situation:
        standing = await self._standing(live)
        least = self.rules.fall * self.rules.rise_share
        asked = {
            ref: each
            for ref, each in self._traffic.asked().items()
            if ref in standing or (each.share >= least and await self._is_ready(ref))
        }
        situation = Situation(self._ledger.clock(), asked, standing)
        candidates = [ref for ref in asked if ref not in standing]
        if not candidates:
            return situation
        ended = await self._ledger.ended()
        since = situation.now - KNOWN_S
        known_speedup = measured_speedup([*reversed(live), *ended], self._conditions, since)
        full = len(standing) >= self.rules.most
        return replace(
            situation,
            past={ref: found for ref in candidates if (found := past_of(ref, ended)) is not None},
            predictions={ref: predict(self._traffic, ref, known_speedup) for ref in candidates},
            no_room=None if full else await asyncio.to_thread(self._why_no_room),
        )

    async def _standing(self, live: Sequence[Promotion]) -> dict[str, Standing]:
        standing = {
            story.ref: Standing(
                self._ledger.switched.get(story.id, story.created_at.timestamp()),
                story.state in (BUILDING, MEASURING),
                story.origin == BY_HAND,
            )
            for story in live
            if story.state != ADVISED
        }
        for name in self._merged.snapshot():
            version = await self._ledger.version_of(name)
            if version is not None:  # without a story it is built by hand just now, or on its way out
                standing.setdefault(version.ref, Standing(self._ledger.clock(), is_changing=True, by_hand=True))
        return standing

    async def _is_ready(self, ref: str) -> bool:
        version = await self._ledger.version(ref)
        return version is not None and version.state == READY

    def _why_no_room(self) -> str | None:
        try:
            self._room()
        except MergedEngineRefused as refused:
            return refused.message
        return None

    async def _withdraw(self, live: Sequence[Promotion]) -> None:
        wanted = {each.ref for each in self.decisions if each.action in ("promote", "wait")}
        for story in live:
            if story.state == ADVISED and self.mode != "advise":
                await self._ledger.change(story, f"promotion is {self.mode} now", WITHDRAWN)
            elif story.state == ADVISED and story.ref not in wanted:
                await self._ledger.change(story, "it is not asked by so many any more, or has an engine", WITHDRAWN)

    async def _act(self, live: Sequence[Promotion]) -> None:
        stories = {story.ref: story for story in live if story.state != ADVISED}
        for each in self.decisions:
            if each.action == "demote":
                await self._course.end(stories[each.ref], each.reason)
            elif each.action == "promote" and (version := await self._ledger.servable(each.ref)) is not None:
                await self._course.begin(version, each.reason, each.figures)

    async def _advise(self, live: Sequence[Promotion]) -> None:
        known = {story.ref for story in live if story.state == ADVISED}
        for each in self.decisions:
            if each.action == "promote" and each.ref not in known:
                version = await self._ledger.servable(each.ref)
                if version is not None:
                    await self._ledger.begin(version, ADVISED, each.reason, figures=each.figures)


def rules_of(settings: Settings) -> Rules:
    return Rules(
        rise_share=settings.promotion_share,
        tokens_per_minute=settings.promotion_tokens_per_minute,
        rise_s=settings.promotion_window_s / 5,
        fall_s=settings.promotion_window_s,
        min_life_s=settings.promotion_min_life_s,
        cool_down_s=settings.promotion_cool_down_s,
        most=settings.max_merged_engines,
        least_speedup=settings.promotion_speedup,
    )
