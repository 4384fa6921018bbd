"""Which requests count when the slots are given out. What becomes of them is tested in flows, on the engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from server.vllm_plugin.slot_rotation import Rotation

pytest.importorskip("vllm")
pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


def request(adapter: int, status: str) -> Any:
    from vllm.v1.request import RequestStatus

    lora = SimpleNamespace(lora_int_id=adapter) if adapter else None
    return SimpleNamespace(lora_request=lora, status=RequestStatus[status], next_decode_eligible_step=0)


def step(monkeypatch: pytest.MonkeyPatch, running: list[Any], waiting: list[Any]) -> frozenset[int]:
    """Who computes, with one slot, in the first step of a scheduler that has these requests."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from server.vllm_plugin.scheduler import RotatingScheduler

    monkeypatch.setattr(Scheduler, "schedule", lambda *_: SimpleNamespace(num_scheduled_tokens={}))
    made = RotatingScheduler.__new__(RotatingScheduler)
    made.running, made.waiting, made.kv_holding_waiting, made.current_step = running, waiting, [], 7
    made._rotation = Rotation(1, 10.0)
    made.schedule()
    return made._computing


def test_a_request_that_waits_for_its_grammar_holds_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling, ready = request(1, "WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR"), request(2, "WAITING")
    assert step(monkeypatch, [], [compiling, ready]) == {2}
    assert step(monkeypatch, [], [request(1, "WAITING"), ready]) == {1}


def test_who_has_no_slot_sits_the_step_out_and_the_base_never_does(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, base = (request(adapter, "RUNNING") for adapter in (1, 2, 0))
    assert step(monkeypatch, [first, second, base], []) == {1}
    assert [each.next_decode_eligible_step for each in (first, second, base)] == [0, 9, 0]
