from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from server.engine.observe import Observation, _observed


async def test_an_answer_that_comes_as_a_whole_was_decoded_for_as_long_as_one_in_pieces() -> None:
    async def whole() -> AsyncIterator[Any]:
        await asyncio.sleep(0.05)
        tokens = SimpleNamespace(token_ids=[1, 2, 3, 4, 5])
        metrics = SimpleNamespace(first_token_latency=0.01, is_corrupted=False)
        yield SimpleNamespace(prompt_token_ids=[7], outputs=[tokens], finished=True, metrics=metrics)

    seen = Observation("a")
    assert len([output async for output in _observed(whole(), "request", seen)]) == 1
    assert (seen.stats.ttft_s, seen.stats.generated_tokens) == (0.01, 5)
    assert seen.stats.decode_s >= 0.04
