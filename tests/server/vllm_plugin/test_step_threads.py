"""How many threads a step is given."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from server.vllm_plugin import step_threads

torch = pytest.importorskip("torch")


@pytest.fixture
def _threads_as_before() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def runner(monkeypatch: pytest.MonkeyPatch, short: str | None, weights: int, most: str | None = "2") -> Any:
    """A model runner after its model was loaded by a process with two threads."""
    torch.set_num_threads(2)
    for name, value in ((step_threads.SHORT_STEP_THREADS, short), ("OMP_NUM_THREADS", most)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    made = SimpleNamespace(model=torch.nn.Module())
    step_threads.load_model(lambda _: None)(made)
    made.step_threads.weights = weights
    return made


def used(made: Any, tokens: int) -> int:
    step = SimpleNamespace(total_num_scheduled_tokens=tokens)
    return int(step_threads.execute_model(lambda *_: torch.get_num_threads())(made, step))


@pytest.mark.usefixtures("_threads_as_before")
def test_a_short_step_uses_few_and_a_long_one_all(monkeypatch: pytest.MonkeyPatch) -> None:
    made = runner(monkeypatch, "1", 10**8)
    assert [used(made, tokens) for tokens in (1, 19, 20, 1000, 1)] == [1, 1, 2, 2, 1]
    large = runner(monkeypatch, "1", 10**9)
    assert used(large, 1) == 2  # every weight is read, for one token as for three


@pytest.mark.usefixtures("_threads_as_before")
@pytest.mark.parametrize("short", [None, "2", "16"])
def test_all_for_every_step(monkeypatch: pytest.MonkeyPatch, short: str | None) -> None:
    made = runner(monkeypatch, short, 10**8)
    monkeypatch.setattr(torch._C, "set_num_threads", lambda _: pytest.fail("torch was told"))
    assert [used(made, tokens) for tokens in (1, 1000)] == [2, 2]


@pytest.mark.usefixtures("_threads_as_before")
def test_nothing_changes_where_vllm_binds_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [used(runner(monkeypatch, "1", 10**8, most=None), tokens) for tokens in (1, 1000)] == [2, 2]


def test_weights_in_four_bits_count_twice_a_byte() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Module())
    model[1].packed_nf4 = SimpleNamespace(codes=torch.zeros(6, 5, dtype=torch.uint8))
    model[1].register_parameter("weight", torch.nn.Parameter(torch.zeros(7, 1, dtype=torch.uint8), False))
    assert step_threads.count_weights(model) == 32 + 60 + 14


def test_cores_are_counted_once_however_many_threads_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= step_threads.physical_cores() <= (os.cpu_count() or 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(step_threads, "_siblings", lambda cpu: "0,2" if cpu % 2 == 0 else f"{cpu}")
    assert step_threads.physical_cores() == 3
