"""Which adapters compute in a step, when requests of more of them are under way than there are slots.

vLLM runs what it has let in to its end: a stream of long answers for one adapter keeps another out of its slot until
the last of them is done. Here the slots go round: the adapter that has received least computes next, and one that has
received more pauses in the middle of its answers, which keep their KV cache and go on where they were. The virtual
token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), taken to slots.

Hysteresis: who gets a slot keeps it for `turn_s`, so that the time to fill one (milliseconds) stays small beside its
use. An adapter whose first request has just come need not wait so long: a tenth of it, once. Work-conserving: while
there is a slot for everybody nobody pauses. Knows nothing of vLLM: an adapter is a number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

NEWCOMER = 0.1
"""The share of a turn after which a newcomer may have the slot."""


class Rotation:
    """`slots` of them may compute in a step, each for `turn_s` at least while others want its slot."""

    def __init__(self, slots: int, turn_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._slots = slots
        self._turn_s = turn_s
        self._clock = clock
        self._since_s: dict[int, float] = {}
        """Who has a slot, and since when."""
        self._served: dict[int, float] = {}
        """What each has received."""
        self._wanted: frozenset[int] = frozenset()
        """Who had requests in the last step."""
        self._new: set[int] = set()
        """Who has come and not had a slot since."""

    def choose(self, wanted: Collection[int]) -> frozenset[int]:
        """Who computes in the next step, of the adapters that have requests."""
        self._admit(wanted)
        now = self._clock()
        outside = sorted(set(wanted) - self._since_s.keys(), key=lambda adapter: (self._served[adapter], adapter))
        for adapter in outside:
            if len(self._since_s) >= self._slots:
                leaving = self._most_served(now - self._turn_s * (NEWCOMER if adapter in self._new else 1))
                if leaving is None or not self._comes_before(adapter, leaving):
                    continue
                del self._since_s[leaving]
            self._since_s[adapter] = now
            self._new.discard(adapter)
        return frozenset(self._since_s)

    def charge(self, adapter: int, cost: float) -> None:
        self._served[adapter] += cost

    def _comes_before(self, adapter: int, holder: int) -> bool:
        mine, its = self._served[adapter], self._served[holder]
        return mine < its or (mine == its and adapter in self._new)

    def _admit(self, wanted: Collection[int]) -> None:
        """Those without requests give up their slots; those that come start at the level of the least served that
        stays, or of those that have just left, so that nobody saves up for a flood."""
        for adapter in self._since_s.keys() - set(wanted):
            del self._since_s[adapter]
        staying = [self._served[adapter] for adapter in wanted if adapter in self._wanted]
        level = min(staying) if staying else max(self._served.values(), default=0.0)
        for adapter in [adapter for adapter, served in self._served.items() if adapter not in wanted]:
            if not wanted or self._served[adapter] <= level:
                del self._served[adapter]  # says nothing any more
        self._new.intersection_update(wanted)
        self._new.update(set(wanted) - self._wanted)
        self._wanted = frozenset(wanted)
        for adapter in wanted:
            self._served[adapter] = max(level, self._served.get(adapter, level))

    def _most_served(self, before_s: float) -> int | None:
        """Of those that have had their slot since then."""
        due = [adapter for adapter, since_s in self._since_s.items() if since_s <= before_s]
        return max(due, key=lambda adapter: self._served[adapter], default=None)
