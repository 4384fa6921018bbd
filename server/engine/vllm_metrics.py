"""vLLM's Prometheus metrics in a registry of our own, one per engine, without its unbounded adapter series.

vLLM registers on the global registry and each further engine unregisters the last one's metrics; its
`lora_requests_info` makes a new series for every combination of names. telemetry.py emits a correct one instead.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


def stat_logger(registry: CollectorRegistry) -> type[Any]:
    """A subclass of vLLM's Prometheus logger that writes to `registry`."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    class OwnRegistryLogger(PrometheusStatLogger):  # type: ignore[misc]
        _gauge_cls = partial(Gauge, registry=registry)
        _counter_cls = partial(Counter, registry=registry)
        _histogram_cls = partial(Histogram, registry=registry)

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            unbounded: Any = getattr(self, "gauge_lora_info", None)
            if unbounded is not None:
                registry.unregister(unbounded)  # else its family stays on the page, twice with telemetry.py's
            self.gauge_lora_info = None

    return OwnRegistryLogger
