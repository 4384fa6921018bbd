"""What each version was asked in the last minutes, and how fast each way answered it: the figures for promotions.

Fed with every request that has ended; a call takes a few microseconds. Sliding buckets, bounded: where more versions
are asked than are kept, those with the fewest tokens are forgotten. Knows no engine and no policy.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

BUCKETS = 30
"""Of a window."""
MOST_VERSIONS = 256
"""That are kept; up to twice as many are until it is looked who is asked least."""
MOST_SAMPLES = 200
"""Of one version and way."""


@dataclass(frozen=True, slots=True)
class Sample:
    """How fast one request was answered."""

    at: float
    ttft_s: float | None
    """From the engine's taking it to the first token."""
    tpot_s: float | None
    """From one token to the next; None where there was one only, or several choices."""
    load: int
    """How many requests ran when it ended, this one included."""


@dataclass(frozen=True)
class Asked:
    """Of one version, within the window."""

    tokens_per_minute: float
    """Of prompts and answers. Over the whole window, so that a young one is not overrated."""
    share: float
    """Of all tokens, those of the base and of versions that were forgotten included."""
    requests: int


class _Window:
    """Tokens and requests by bucket."""

    __slots__ = ("buckets", "requests", "tokens")

    def __init__(self) -> None:
        self.buckets: deque[list[int]] = deque()
        self.tokens = self.requests = 0

    def add(self, bucket: int, tokens: int) -> None:
        if not self.buckets or self.buckets[-1][0] < bucket:
            self.buckets.append([bucket, 0, 0])
        last = self.buckets[-1]
        last[1] += tokens
        last[2] += 1
        self.tokens += tokens
        self.requests += 1
        self.forget(bucket - BUCKETS)

    def forget(self, until: int) -> None:
        while self.buckets and self.buckets[0][0] <= until:
            _, tokens, requests = self.buckets.popleft()
            self.tokens -= tokens
            self.requests -= requests


class _Version:
    __slots__ = ("samples", "window")

    def __init__(self) -> None:
        self.window = _Window()
        self.samples: dict[str, deque[Sample]] = {}
        """By way."""


class Traffic:
    """Versions by their `name@number`; None is the base."""

    def __init__(self, window_s: float, *, most: int = MOST_VERSIONS, clock: Callable[[], float] = time.time) -> None:
        self.window_s = window_s
        self._most = most
        self._clock = clock
        self._all = _Window()
        self._base = _Version()
        self._versions: dict[str, _Version] = {}

    def ended(
        self,
        ref: str | None,
        way: str,
        *,
        tokens: int,
        ttft_s: float | None = None,
        tpot_s: float | None = None,
        load: int = 1,
    ) -> None:
        """One request, of so many tokens in its prompt and answers, answered by this way: `base`, `lora`, `merged`."""
        now = self._clock()
        bucket = self._bucket(now)
        self._all.add(bucket, tokens)
        version = self._base if ref is None else self._versions.get(ref) or self._enter(ref, bucket)
        version.window.add(bucket, tokens)
        if ttft_s is not None:
            samples = version.samples.get(way)
            if samples is None:
                samples = version.samples[way] = deque(maxlen=MOST_SAMPLES)
            samples.append(Sample(now, ttft_s, tpot_s, load))

    def asked(self) -> dict[str, Asked]:
        """Only versions that were."""
        until = self._bucket(self._clock()) - BUCKETS
        windows = {ref: version.window for ref, version in self._versions.items()}
        for window in (self._all, *windows.values()):
            window.forget(until)
        whole = max(1, self._all.tokens)
        return {
            ref: Asked(60 * window.tokens / self.window_s, window.tokens / whole, window.requests)
            for ref, window in windows.items()
            if window.requests
        }

    def samples(self, ref: str | None, way: str, since: float = 0.0) -> list[Sample]:
        """The oldest first, at most the last `MOST_SAMPLES`."""
        version = self._base if ref is None else self._versions.get(ref)
        return [] if version is None else [each for each in version.samples.get(way, ()) if each.at >= since]

    def samples_of(self, way: str) -> list[Sample]:
        """Of whichever version was answered by it."""
        return [sample for version in self._versions.values() for sample in version.samples.get(way, ())]

    def _bucket(self, now: float) -> int:
        return int(now * BUCKETS / self.window_s)

    def _enter(self, ref: str, bucket: int) -> _Version:
        """Many are forgotten at once, and seldom: looking for the least at each newcomer would cost more than all
        else."""
        if len(self._versions) >= 2 * self._most:
            for version in self._versions.values():
                version.window.forget(bucket - BUCKETS)
            by_tokens = sorted(self._versions.items(), key=lambda each: -each[1].window.tokens)
            self._versions = dict(by_tokens[: self._most])
        version = self._versions[ref] = _Version()
        return version
