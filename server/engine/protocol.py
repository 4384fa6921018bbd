"""What the rest of the server may ask of an inference engine.

Frozen records cross this border, so that no module outside `engine/` imports vLLM. The engine never resolves a
name and never decides what is resident: `residency.py` hands it adapters, and a generation names one by handle.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from prometheus_client.metrics_core import Metric

Endpoint = Literal["chat", "completions"]


@dataclass(frozen=True)
class AdapterHandle:
    """One load of one adapter version, as the engine knows it.

    `name` and `path` are immutable per version (they carry its digest: the engine's prefix cache is keyed by both);
    `int_id` is fresh for every load.
    """

    name: str
    path: str
    int_id: int


@dataclass(frozen=True)
class Generation:
    """One client request, resolved: everything an engine needs to answer it."""

    endpoint: Endpoint
    body: Mapping[str, Any]
    """The client's JSON object, unchecked: the engine validates it and answers 400 itself."""
    request_id: str
    echo_model: str
    """What the client wrote in `model`; the answer repeats it."""
    adapter: AdapterHandle | None
    """None is the base model."""


@dataclass
class Stats:
    """Filled in while a generation runs; complete once it has been closed."""

    ttft_s: float | None = None
    """Seconds from submission to the first token."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    corrupted: bool = False
    """The logits held NaN: the answer was cut off with an error."""
    prompt_ids: list[int] = field(default_factory=list)
    """The prompt's tokens, and those that were generated; mixed where a request has several prompts or choices."""
    generated_ids: list[int] = field(default_factory=list)
    decode_s: float = 0.0
    """From the first token to the last."""

    @classmethod
    def total(cls, several: Sequence[Stats]) -> Stats:
        """What one request cost that was worked on more than once."""
        first_token = [stats.ttft_s for stats in several if stats.ttft_s is not None]
        return cls(
            first_token[0] if first_token else None,
            sum(stats.prompt_tokens for stats in several),
            sum(stats.generated_tokens for stats in several),
        )


@dataclass
class Answer:
    """What goes back to the client: either one JSON body, or server-sent events that are still to come."""

    stats: Stats
    status: int = 200
    body: dict[str, Any] | None = None
    events: AsyncIterator[str] | None = None
    """Complete SSE events, `data: …\\n\\n`, the last one `data: [DONE]\\n\\n`."""


@dataclass(frozen=True)
class EngineInfo:
    """Facts about a started engine."""

    model_name: str
    max_model_len: int
    start_s: float
    extra: Mapping[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """One engine process group. Every method but `start` may raise EngineUnavailable once it has died."""

    @property
    def info(self) -> EngineInfo: ...

    async def start(self) -> None:
        """Build the engine; returns when it can generate."""

    async def stop(self) -> None:
        """End it and its processes; safe on one that has died or never started."""

    async def check_health(self) -> None:
        """Raise EngineUnavailable when the engine is dead."""

    async def add_adapter(self, handle: AdapterHandle) -> None:
        """Load an adapter between steps. On failure nothing of it may be left registered."""

    async def remove_adapter(self, handle: AdapterHandle) -> None:
        """Free an adapter's memory. Only for one that no generation uses."""

    async def adapter_ids(self) -> set[int]:
        """`int_id` of every adapter the engine holds."""

    def generate(self, generation: Generation) -> AbstractAsyncContextManager[Answer]:
        """Run one generation; leaving the context aborts what has not finished, before anything else is asked."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of tokens."""

    def metrics(self) -> Iterable[Metric]:
        """The engine's own Prometheus families."""
