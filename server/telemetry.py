"""Metrics of our own: what vLLM does not say about adapters. Label values are bounded, whatever clients send."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from adapters.job_records import Job
from server.engine.merged import MergedEngines
from server.engine.pool import EnginePool
from server.engine.protocol import Stats
from server.fairness import Turns
from server.residency import Residency

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
OTHER = "_other"


class AdapterLabels:
    """The first `limit` names keep a label of their own; all later ones share `_other`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def of(self, name: str) -> str:
        if name not in self._known and len(self._known) >= self._limit:
            return OTHER
        self._known.add(name)
        return name


class Telemetry:
    """Counts requests by adapter, and reads residency and engine state when a page is asked for."""

    def __init__(self, max_adapters: int) -> None:
        self._registry = CollectorRegistry()
        self._labels = AdapterLabels(max_adapters)
        named = {"registry": self._registry}
        self._requests = Counter("loraplex_requests", "Generation requests", ["adapter", "endpoint", "status"], **named)  # type: ignore[arg-type]
        self._tokens = Counter("loraplex_generated_tokens", "Tokens generated", ["adapter"], **named)  # type: ignore[arg-type]
        self._prompt = Counter("loraplex_prompt_tokens", "Prompt tokens", ["adapter"], **named)  # type: ignore[arg-type]
        self._shadows = Counter("loraplex_shadow", "Requests asked again of a shadow", ["adapter", "outcome"], **named)  # type: ignore[arg-type]
        self._rescued = Counter(
            "loraplex_merged_rescues",
            "Requests whose merged engine died",
            ["adapter", "outcome"],
            registry=self._registry,
        )
        self._ttft = Histogram(
            "loraplex_time_to_first_token_seconds",
            "From submission to the engine to the first token",
            ["adapter"],
            buckets=SECONDS,
            registry=self._registry,
        )

        self._waited = Histogram(
            "loraplex_turn_wait_seconds",
            "From arrival until it was the request's turn to go to the engine",
            ["adapter"],
            buckets=SECONDS,
            registry=self._registry,
        )

        self._promotions = Counter(
            "loraplex_promotions", "What became of promotions", ["outcome"], registry=self._registry
        )
        self._jobs = Counter("loraplex_jobs", "Jobs that ended here", ["kind", "state"], **named)  # type: ignore[arg-type]

    def job_ended(self, job: Job) -> None:
        self._jobs.labels(job.kind, job.state).inc()

    def request(self, adapter: str, endpoint: str, status: int, stats: Stats) -> None:
        """Record one finished generation. `adapter` is the registered name, or the base model's."""
        label = self._labels.of(adapter)
        self._requests.labels(label, endpoint, str(status)).inc()
        self._tokens.labels(label).inc(stats.generated_tokens)
        self._prompt.labels(label).inc(stats.prompt_tokens)
        if stats.ttft_s is not None:
            self._ttft.labels(label).observe(stats.ttft_s)

    def shadowed(self, adapter: str, outcome: str) -> None:
        """Record what became of one request for a shadow: agreed, differed, failed or dropped."""
        self._shadows.labels(self._labels.of(adapter), outcome).inc()

    def rescued(self, adapter: str, outcome: str) -> None:
        """Record what became of a request whose merged engine died: asked again, continued or failed."""
        self._rescued.labels(self._labels.of(adapter), outcome).inc()

    def promotion(self, outcome: str) -> None:
        """Record what became of one: `kept`, or the state of its story."""
        self._promotions.labels(outcome).inc()

    def waited(self, adapter: str, seconds: float) -> None:
        """Record how long a request stood in line before it went to the engine."""
        self._waited.labels(self._labels.of(adapter)).observe(seconds)

    def page(
        self, pool: EnginePool, turns: Turns, residency: Residency, merged: MergedEngines, max_loras: int
    ) -> bytes:
        """vLLM's families, ours, and those read on the spot, as one Prometheus text page."""
        engines = _one_of_each(_engine_families([pool, *(entry.pool for entry in merged.snapshot().values())]))
        states = (_state(pool, turns, residency, max_loras), _merged_state(merged))
        page = CollectorRegistry()
        page.register(_Families(self._registry, engines, *states))
        return generate_latest(page)


class _Source(Protocol):
    def collect(self) -> Iterable[Metric]: ...


class _Families(Collector):
    def __init__(self, own: _Source, *others: Iterable[Metric]) -> None:
        self._own = own
        self._others = others

    def collect(self) -> Iterator[Metric]:
        yield from self._own.collect()
        for families in self._others:
            yield from families


def _engine_families(pools: Iterable[EnginePool]) -> Iterator[Metric]:
    for pool in pools:
        if pool.state == "ready":
            yield from pool.running().metrics()


def _one_of_each(families: Iterable[Metric]) -> Iterable[Metric]:
    """Families of several engines, those of a name as one: a page may have each only once. vLLM labels its samples
    with the name of the model, which is another one for each engine."""
    found: dict[str, Metric] = {}
    for family in families:
        if family.name in found:
            found[family.name].samples.extend(family.samples)
        else:
            found[family.name] = family
    return found.values()


def _merged_state(merged: MergedEngines) -> Iterator[Metric]:
    labels = ["adapter", "name"]
    engines = merged.snapshot()
    ready = GaugeMetricFamily("loraplex_merged_engine_ready", "1 when it answers its version's requests", labels=labels)
    memory = GaugeMetricFamily("loraplex_merged_engine_planned_bytes", "Memory that was planned for it", labels=labels)
    leases = GaugeMetricFamily("loraplex_merged_engine_leases", "Requests using it", labels=labels)

    def add(family: GaugeMetricFamily, name: str, value: float) -> None:
        family.add_metric([name.partition("@")[0], name], value)

    for name, engine in engines.items():
        add(ready, name, float(engine.state == "ready"))
        add(memory, name, engine.plan.total)
        add(leases, name, engine.leases)
    yield from (ready, memory, leases)
    yield CounterMetricFamily("loraplex_merged_engine_restarts", "Merged engines lost while they ran", merged.restarts)


def _state(pool: EnginePool, turns: Turns, residency: Residency, max_loras: int) -> Iterator[Metric]:
    held = residency.snapshot()
    yield GaugeMetricFamily("loraplex_engine_ready", "1 when a token can be generated", float(pool.state == "ready"))
    yield CounterMetricFamily("loraplex_engine_restarts", "Engines rebuilt after a loss", pool.restarts)
    yield GaugeMetricFamily("loraplex_requests_waiting", "Requests that wait for their turn", turns.waiting)
    yield GaugeMetricFamily("loraplex_adapters_resident", "Adapters the engine holds", len(held))
    yield GaugeMetricFamily(
        "loraplex_adapter_leases", "Requests using an adapter", sum(e.leases for e in held.values())
    )
    for name in ("loads", "hits", "evictions", "failures"):
        value = getattr(residency.counters, name)
        yield CounterMetricFamily(f"loraplex_adapter_{name}", f"Adapter {name} since start", value)
    yield _lora_requests_info(held.keys(), residency.loading(), max_loras)


def _lora_requests_info(held: Iterable[str], loading: Iterable[str], max_loras: int) -> Metric:
    """What routers of the Gateway API inference extension read: one series; running = loaded in the engine."""
    info = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Adapters loaded in the engine and waiting to be; the value is the time of this reading",
        labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    )
    info.add_metric([str(max_loras), ",".join(sorted(held)), ",".join(sorted(loading))], time.time())
    return info
