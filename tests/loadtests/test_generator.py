"""The real load generator over real HTTP, against our server with the engine that needs no model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from adapters.base import BaseModel
from loadtests.generator import LoadError, LoadGenerator
from loadtests.servers import upload
from loadtests.synthetic import write_adapters
from loadtests.trace import Lengths, Request, Trace, Workload, make_trace
from server.launch import ServerProcess, launch


@pytest.fixture(scope="module")
def server(demo_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("served")
    flags = ["--engine", "fake", "--model", str(demo_base), "--served-model-name", "base"]
    with launch([*flags, "--data-dir", str(root / "data")], root / "server.log") as running:
        running.wait_ready()
        base = BaseModel.read(demo_base, cache_dir=root / "fingerprints")
        upload(running.url, write_adapters(root / "adapters", base, ["one", "two"], ranks=[4, 8]))
        yield running


@pytest.fixture(scope="module")
def generator(demo_base: Path) -> Iterator[LoadGenerator]:
    with LoadGenerator(demo_base, quiet=True) as running:
        yield running


def test_every_request_of_a_trace_is_asked_and_timed(generator: LoadGenerator, server: ServerProcess) -> None:
    requests = tuple(
        Request(0.2 * number, model, 10 + number, 3 + number) for number, model in enumerate(("base", "one", "two"))
    )

    outcomes = generator.replay(Trace(requests, None, 0), server.url)

    assert [(one.model, one.output_tokens) for one in outcomes] == [("base", 3), ("one", 4), ("two", 5)]
    assert [len(one.itl_s) for one in outcomes] == [
        one.output_tokens for one in outcomes
    ]  # the fake ends with an event
    assert all(one.start_s >= request.at_s for one, request in zip(outcomes, requests, strict=True))
    assert all(0 < one.ttft_s <= one.latency_s for one in outcomes)


def test_a_closed_loop_keeps_its_number_of_clients(generator: LoadGenerator, server: ServerProcess) -> None:
    trace = make_trace(Workload(("one",), 6, Lengths(8, 8), Lengths(4, 4), concurrency=1), 0)

    outcomes = sorted(generator.replay(trace, server.url), key=lambda one: one.start_s)

    assert all(later.start_s >= earlier.end_s for earlier, later in pairwise(outcomes))


def test_a_failed_request_is_an_error_and_the_generator_goes_on(
    generator: LoadGenerator, server: ServerProcess
) -> None:
    with pytest.raises(LoadError, match=r"1 of 2 requests failed.*nobody"):
        generator.replay(Trace((Request(0, "base", 8, 2), Request(0, "nobody", 8, 2)), None, 0), server.url)

    assert len(generator.replay(Trace((Request(0, "base", 8, 2),), None, 1), server.url)) == 1
