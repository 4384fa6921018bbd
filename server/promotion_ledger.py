"""What promotions write down and look up: stories with their time, log line and count; versions by their names."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from adapters.errors import NotFound
from adapters.promotions import ADVISED, Promotion, Promotions
from adapters.records import MERGE_ONLY, READY
from adapters.registry import Registry, Version
from server.telemetry import Telemetry

log = logging.getLogger(__name__)

LOOKED_AT = 200
"""Stories that have ended, from which it is known how often a version failed, and how fast merged engines are."""


class Ledger:
    def __init__(
        self, stories: Promotions, registry: Registry, telemetry: Telemetry, clock: Callable[[], float] = time.time
    ) -> None:
        self._stories = stories
        self._registry = registry
        self._telemetry = telemetry
        self.clock = clock
        self.switched: dict[str, float] = {}
        """Story → when requests first went to its engine in this process."""

    async def live(self) -> list[Promotion]:
        """This server's, the oldest first."""
        return await asyncio.to_thread(self._stories.mine)

    async def ended(self) -> list[Promotion]:
        """This server's, the newest first."""
        found = await asyncio.to_thread(lambda: self._stories.promotions(ended=True, limit=LOOKED_AT))
        return [story for story in found if story.server == self._stories.server]

    async def begin(self, version: Version, state: str, reason: str, **more: Any) -> Promotion:
        log.info("promotion", extra={"adapter": version.ref, "state": state, "reason": reason})
        begin = self._stories.begin
        named = (version.adapter, version.number, state, reason)
        begun = await asyncio.to_thread(lambda: begin(*named, at=self.clock(), **more))
        if state == ADVISED:
            self._telemetry.promotion(ADVISED)
        return begun

    async def change(self, story: Promotion, reason: str, state: str, **more: Any) -> None:
        log.info("promotion", extra={"adapter": story.ref, "state": state, "reason": reason})
        change = self._stories.change
        changed = await asyncio.to_thread(lambda: change(story.id, reason, state=state, at=self.clock(), **more))
        if changed.has_ended:
            self.switched.pop(story.id, None)
            self._telemetry.promotion(state)

    def kept(self) -> None:
        self._telemetry.promotion("kept")

    async def version(self, ref: str) -> Version | None:
        """None where it is not registered any more."""
        name, _, number = ref.partition("@")
        with contextlib.suppress(NotFound):
            return await asyncio.to_thread(self._registry.resolve, name, number)
        return None

    async def version_of(self, engine: str) -> Version | None:
        """By the name of its engine."""
        adapter, _, digest = engine.partition("@")
        return await self.version(f"{adapter}@sha256:{digest}")

    async def servable(self, ref: str) -> Version | None:
        version = await self.version(ref)
        return version if version is not None and version.state in (READY, MERGE_ONLY) else None
