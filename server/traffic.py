"""What each version was asked in the last minutes, and how fast each way answered it: the figures for promotions.

Fed with every request that has ended; a call takes a few microseconds. Sliding buckets, bounded: where more versions
are asked than are kept, those with the fewest tokens are forgotten. Knows no engine and no policy.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

BUCKETS = 30
"""Of a window."""
MOST_VERSIONS = 256
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


class Traffic:
    """Versions by their `name@number`; None is the base."""

    def __init__(self, window_s: float, *, most: int = MOST_VERSIONS, clock: Callable[[], float] = time.time) -> None:
        self.window_s = window_s
        self._most = most
        self._clock = clock
        self._all = _Window()
        self._versions: dict[str, _Window] = {}
        self._samples: dict[tuple[str | None, str], deque[Sample]] = {}

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
        if ref is not None:
            window = self._versions.get(ref)
            if window is None:
                window = self._enter(ref, bucket)
            window.add(bucket, tokens)
        if ttft_s is not None:
            samples = self._samples.get((ref, way))
            if samples is None:
                samples = self._samples[ref, way] = deque(maxlen=MOST_SAMPLES)
            samples.append(Sample(now, ttft_s, tpot_s, load))

    def asked(self) -> dict[str, Asked]:
        """Only versions that were."""
        until = self._bucket(self._clock()) - BUCKETS
        for window in (self._all, *self._versions.values()):
            window.forget(until)
        whole = max(1, self._all.tokens)
        return {
            ref: Asked(60 * window.tokens / self.window_s, window.tokens / whole, window.requests)
            for ref, window in self._versions.items()
            if window.requests
        }

    def samples(self, ref: str | None, way: str, since: float = 0.0) -> Sequence[Sample]:
        """The oldest first, at most the last `MOST_SAMPLES`."""
        return [sample for sample in self._samples.get((ref, way), ()) if sample.at >= since]

    def samples_of(self, way: str, since: float = 0.0) -> Mapping[str | None, Sequence[Sample]]:
        """Whoever was answered by it."""
        return {ref: found for ref, of in self._samples if of == way and (found := self.samples(ref, way, since))}

    def _bucket(self, now: float) -> int:
        return int(now * BUCKETS / self.window_s)

    def _enter(self, ref: str, bucket: int) -> _Window:
        if len(self._versions) >= self._most:
            for window in self._versions.values():
                window.forget(bucket - BUCKETS)
            least = min(self._versions, key=lambda each: self._versions[each].tokens)
            del self._versions[least]
            for key in [key for key in self._samples if key[0] == least]:
                del self._samples[key]
        self._versions[ref] = _Window()
        return self._versions[ref]
