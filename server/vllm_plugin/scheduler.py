"""vLLM's scheduler, with the adapter slots going round (slot_rotation). Named by `--scheduler-cls`, imported by vLLM.

Nothing of vLLM's own scheduling is replaced. A request that pauses is left out of a step by the means vLLM has for it
(`next_decode_eligible_step`, made for pipelines), keeps its KV blocks, and leaves the worker's batch until it goes on.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from server.fairness import GENERATED_TOKEN, PROMPT_TOKEN
from server.vllm_plugin.slot_rotation import Rotation

TURN_S, SEQUENCES = "adapter_turn_s", "sequences"
"""Keys in vLLM's `additional_config`: see slot_rotation; and how many sequences a step decodes, unless one more is the
first of its adapter, which may use what `max_num_seqs` is beyond that."""
NO_ADAPTER = 0
READY = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
"""Of waiting requests. Others wait for their grammar, say: one that could not compute must not hold a slot."""


class RotatingScheduler(Scheduler):  # type: ignore[misc]
    def __init__(self, vllm_config: Any, *arguments: Any, **more: Any) -> None:
        super().__init__(vllm_config, *arguments, **more)
        slots = self.lora_config.max_loras if self.lora_config else 1
        self._rotation = Rotation(slots, float(vllm_config.additional_config[TURN_S]))
        self._sequences = int(vllm_config.additional_config[SEQUENCES])
        self._computing: frozenset[int] = frozenset()

    def schedule(self, throttle_prefills: bool = False) -> Any:
        ready = [request for request in (*self.kv_holding_waiting, *self.waiting) if request.status in READY]
        under_way = [*self.running, *ready]
        self._computing = self._rotation.choose({adapter_of(request) for request in under_way} - {NO_ADAPTER})
        for request in self.running:
            if not self._may_compute(request):
                request.next_decode_eligible_step = self.current_step + 2  # the step that begins is + 1
        step = super().schedule(throttle_prefills)
        self._charge(step.num_scheduled_tokens)
        return step

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        return (
            super()._handle_blocked_waiting_request(request) and self._may_compute(request) and self._may_join(request)
        )

    def _may_join(self, request: Request) -> bool:
        adapter = adapter_of(request)
        return len(self.running) < self._sequences or all(adapter_of(each) != adapter for each in self.running)

    def _may_compute(self, request: Request) -> bool:
        adapter = adapter_of(request)
        return adapter == NO_ADAPTER or adapter in self._computing

    def _charge(self, tokens: dict[str, int]) -> None:
        for request_id, count in tokens.items():
            request = self.requests[request_id]
            if (adapter := adapter_of(request)) != NO_ADAPTER:
                generates = request.num_computed_tokens - count >= request.num_prompt_tokens
                self._rotation.charge(adapter, count * (GENERATED_TOKEN if generates else PROMPT_TOKEN))


def adapter_of(request: Request) -> int:
    """vLLM's number of the request's adapter, 0 for none."""
    return int(request.lora_request.lora_int_id) if request.lora_request else NO_ADAPTER
