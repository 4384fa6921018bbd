"""Tries an adapter on the engine before it may serve: it must load, give finite log-probabilities, and change them.

The same few texts are read by the base and by the adapter, and the log-probability of every token of theirs is
compared. The request stands in line like any other, so traffic is not disturbed. Knows no registry.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from adapters.refusals import refuse
from server.engine.pool import EnginePool
from server.engine.protocol import AdapterHandle, Engine, Generation
from server.errors import AdapterUnavailable, CorruptedOutput, EngineUnavailable
from server.fairness import BASE, Line, Turn, Turns
from server.residency import Residency

TEXTS = (
    "Question: How do I reset my password?\nAnswer:",
    "def mean(values):\n    return sum(values)",
    "Bonjour, je voudrais annuler ma commande.",
)
"""Short: while the engine reads them, answers that stream meanwhile wait."""
NO_EFFECT = 1e-3
"""Nats: what a change of no token exceeds is none. An adapter of zeros gives 0, rounding in bf16 up to about that."""
CHANGES_NOTHING = "no token's log-probability changed: it answers as the base does"


class Probe:
    def __init__(self, pool: EnginePool, turns: Turns, residency: Residency) -> None:
        self._pool = pool
        self._turns = turns
        self._residency = residency
        self._of_base: tuple[Engine, list[float]] | None = None

    async def ready(self) -> None:
        """Wait for an engine; raises EngineUnavailable when none comes."""
        await self._pool.ready()

    async def measure(self, name: str, path: Path) -> Mapping[str, Any]:
        """What it changes, in nats over the texts' tokens. `name`: the engine's for it.

        Raises InvalidAdapter (`probe_failed`) when the adapter is at fault; EngineUnavailable and Overloaded when not.
        """
        started = time.perf_counter()
        base = await self._base()
        try:
            async with self._turn(name) as turn, self._residency.lease(name, path) as handle:
                found = await self._read(self._pool.running(), handle, turn)
        except AdapterUnavailable as error:
            raise refuse("probe_failed", f"the engine does not take it: {error.message}") from error
        except CorruptedOutput as error:
            raise refuse("probe_failed", "with it the engine's logits are not finite") from error
        if len(found) != len(base):
            raise EngineUnavailable(f"the engine read {len(base)} tokens without and {len(found)} with the adapter")
        if not all(map(math.isfinite, found)):
            raise refuse("probe_failed", "with it the engine's log-probabilities are not finite")
        changes = [abs(after - before) for before, after in zip(base, found, strict=True)]
        return {
            "tokens": len(changes),
            "mean_change": sum(changes) / len(changes),
            "largest_change": max(changes),
            "warning": CHANGES_NOTHING if max(changes) <= NO_EFFECT else None,
            "took_s": round(time.perf_counter() - started, 3),
        }

    async def _base(self) -> list[float]:
        """Read once by each engine."""
        engine = self._pool.running()
        if self._of_base is None or self._of_base[0] is not engine:
            async with self._turn(BASE) as turn:
                self._of_base = (engine, await self._read(engine, None, turn))
        return self._of_base[1]

    @asynccontextmanager
    async def _turn(self, line: Line) -> AsyncIterator[Turn]:
        turn = self._turns.join(line)
        try:
            await turn.granted
            yield turn
        finally:
            self._turns.leave(turn)

    async def _read(self, engine: Engine, adapter: AdapterHandle | None, turn: Turn) -> list[float]:
        """The log-probability of every token of the texts but each first one. One text at a time: a step of the engine
        that reads all of them would hold up every answer that streams meanwhile."""
        found: list[float] = []
        prompt_tokens = 0
        for text in TEXTS:
            body = {"prompt": text, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
            generation = Generation("completions", body, f"probe-{uuid.uuid4().hex}", engine.info.model_name, adapter)
            async with engine.generate(generation) as answer:
                if answer.stats.corrupted:
                    raise CorruptedOutput("NaN logits while it was probed")
                if answer.status != 200 or answer.body is None:
                    raise EngineUnavailable(f"the engine could not read the probe's texts: {answer.body}")
                tokens = answer.body["choices"][0]["prompt_logprobs"]
                found += [float(next(iter(token.values()))["logprob"]) for token in tokens if token]
                prompt_tokens += answer.stats.prompt_tokens
        turn.charge(prompt_tokens, len(TEXTS))
        return found
