"""Says that this server is up, and clears up after others that do not come back: the jobs that only they could do, and
the stories of their engines. It does not know who else is meant to be there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from adapters.jobs import Jobs
from adapters.promotions import Promotions
from adapters.servers import Servers

log = logging.getLogger(__name__)

BEAT_S = 60.0
LOST_S = 86_400.0
"""Who was not heard of for so long does not come back."""
WATCHED_S = 3_600.0
"""How long this one is up before it says that of others: after a night in which all were down they start one by one."""


class Presence:
    """`forget`: told of each server that is lost."""

    def __init__(
        self, servers: Servers, jobs: Jobs, stories: Promotions, forget: Callable[[str], None] = lambda _: None
    ) -> None:
        self._servers = servers
        self._jobs = jobs
        self._stories = stories
        self._forget = forget
        self._beats: asyncio.Task[None] | None = None
        self._since = time.monotonic()

    async def open(self) -> None:
        self._since = time.monotonic()
        await asyncio.to_thread(self._servers.seen)
        self._beats = asyncio.create_task(self._beat())

    async def close(self) -> None:
        if self._beats is not None:
            self._beats.cancel()
            await asyncio.wait([self._beats])

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                await asyncio.to_thread(self._servers.seen)
                if time.monotonic() - self._since >= WATCHED_S:
                    await asyncio.to_thread(self.clear_up)
            except Exception:  # a database that is away for a moment
                log.exception("saying that this server is up failed")

    def clear_up(self) -> None:
        for lost in self._servers.lost(LOST_S):
            why = f"its server {lost} was not heard of for {LOST_S / 3600:.0f} hours"
            log.warning("a server is lost", extra={"server": lost})
            self._jobs.abandon(lost, why)
            self._stories.abandon(lost, why)
            self._forget(lost)
            self._servers.forget(lost)
