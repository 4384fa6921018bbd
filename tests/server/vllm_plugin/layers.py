"""vLLM's own LoRA wrapper and layers, without an engine around them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

SLOTS = 3
DTYPE: Any = None
"""Of the slots; None: fp32."""


def wrapper(token_slots: list[int], *, prefill: bool = True, sampler_slots: list[int] | None = None) -> Any:
    """vLLM's wrapper after `update_metadata` for these rows; adapter 10 + n lies in slot n."""
    import torch
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    def ids(slots: list[int]) -> tuple[int, ...]:
        return tuple(10 + slot if slot >= 0 else 0 for slot in slots)

    made = PunicaWrapperCPU(64, 64, torch.device("cpu"))
    mapping = SimpleNamespace(
        index_mapping=ids(token_slots),
        prompt_mapping=ids(token_slots if sampler_slots is None else sampler_slots),
        is_prefill=prefill,
    )
    made.update_metadata(mapping, [10 + slot for slot in range(SLOTS)], SLOTS + 1, 100)
    return made


def lora_layer(kind: str, inputs: int, outputs: tuple[int, ...], rank: int, made: Any) -> Any:
    """A LoRA layer of vLLM's around an empty base layer, its slots allocated. `made`: its wrapper."""
    import torch
    from vllm.lora.layers import column_parallel_linear, row_parallel_linear
    from vllm.model_executor.layers import linear

    names = {"QKVParallelLinear": "MergedQKVParallelLinear", "MergedColumnParallelLinear": "MergedColumnParallelLinear"}
    name = f"{names.get(kind, kind)}WithLoRA"
    layer_class = getattr(column_parallel_linear, name, None) or getattr(row_parallel_linear, name)
    layer, base = (each.__new__(each) for each in (layer_class, getattr(linear, kind)))
    for module in (layer, base):
        torch.nn.Module.__init__(module)  # their own need a model and a process group
    layer.base_layer, layer.punica_wrapper = base, made
    layer.input_size, layer.output_size, layer.output_slices = inputs, sum(outputs), outputs
    layer.n_slices, layer.tp_size, layer.device = len(outputs), 1, torch.device("cpu")
    config = SimpleNamespace(max_lora_rank=rank, fully_sharded_loras=False, lora_dtype=DTYPE or torch.float32)
    layer.create_lora_weights(SLOTS, config)
    return layer
