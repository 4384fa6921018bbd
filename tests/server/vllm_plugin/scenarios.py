"""Run as a child process: every scenario on one real engine, what was seen written as JSON. It judges nothing.

    python -m tests.server.vllm_plugin.scenarios ADAPTERS_JSON OUT_JSON [compiled]

With LORAPLEX_PLUGIN=off: vLLM as it comes. `compiled`: as `loraplex serve --compile` runs it.

ADAPTERS_JSON: {"model": base folder, name: adapter folder, ...}. Requests of one scenario share every step: they
are submitted while the engine is paused. Adapters get slots in the order of their first use; there are two slots.
"""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from pathlib import Path
from typing import Any

SLOTS = 2
SHORT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
OTHER = "<|im_start|>user\nName three colours of the rainbow.<|im_end|>\n<|im_start|>assistant\n"
LONG = "<|im_start|>user\nRepeat: " + "a cat sat on a mat, " * 30 + "<|im_end|>\n<|im_start|>assistant\n"


class Observer:
    """One engine and the adapters by name."""

    def __init__(self, engine: Any, folders: dict[str, str]) -> None:
        self.engine = engine
        self.folders = folders
        self.ids = {name: number for number, name in enumerate(folders, start=1)}

    def adapter(self, name: str | None) -> Any:
        from vllm.lora.request import LoRARequest

        return name and LoRARequest(lora_name=name, lora_int_id=self.ids[name], lora_path=self.folders[name])

    async def answer(
        self, name: str | None, prompt: str = SHORT, length: int = 6, prompt_logprobs: int | None = None
    ) -> dict[str, Any]:
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=length, logprobs=5, ignore_eos=True, prompt_logprobs=prompt_logprobs
        )
        generating = self.engine.generate(prompt, sampling, uuid.uuid4().hex, lora_request=self.adapter(name))
        last = [output async for output in generating][-1]
        steps = last.outputs[0].logprobs
        return {
            "tokens": list(last.outputs[0].token_ids),
            "logprobs": [{str(token): value.logprob for token, value in step.items()} for step in steps],
            "corrupted": last.metrics.is_corrupted,
        }

    async def together(self, *names: str | None, prompt: str = SHORT) -> list[dict[str, Any]]:
        await self.engine.pause_generation(mode="keep", clear_cache=False)
        answers = [asyncio.create_task(self.answer(name, prompt)) for name in names]
        await asyncio.sleep(0.3)
        await self.engine.resume_generation()
        return await asyncio.gather(*answers)

    async def joining(self, first: str | None, second: str | None) -> list[dict[str, Any]]:
        """`second` is prefilled while `first` decodes."""
        running = asyncio.create_task(self.answer(first, length=16))
        await asyncio.sleep(0.4)
        return [await self.answer(second), await running]

    async def remove(self, name: str) -> None:
        await self.engine.remove_lora(self.ids[name])

    async def in_worker(self, function: Any) -> Any:
        return (await self.engine.collective_rpc(function))[0]


def slot_sizes(worker: Any) -> list[float]:
    """The sum of the absolute LoRA weights that lie in each slot."""
    manager = worker.model_runner.lora_manager._adapter_manager
    stacks = [
        stack
        for module in manager.modules.values()
        for stack in (*module.lora_a_stacked, *module.lora_b_stacked)
        if stack.dim() == 4
    ]
    return [sum(float(stack[slot].float().abs().sum()) for stack in stacks) for slot in range(SLOTS)]


def wrong_shapes(worker: Any) -> list[list[int]]:
    """Shapes that bitsandbytes gets wrong in the worker, after the model was loaded."""
    from adapters.nf4 import self_test

    return [list(mismatch.shape) for mismatch in self_test([(64, 96), (64, 64)])]


async def observe(seen: Observer) -> dict[str, Any]:
    """The order matters: a stock engine is contaminated a little more by every scenario."""
    result: dict[str, Any] = {"wrong_shapes": await seen.in_worker(wrong_shapes)}
    result["base"] = [await seen.answer(None)]
    result["base_long"] = [await seen.answer(None, LONG)]
    result["base_joined"] = [await seen.answer(None, length=16)]
    result["base_base"] = await seen.together(None, None)
    for name in ("first", "second"):  # slots 0 and 1
        result[name] = [await seen.answer(name)]
    result["base_second"] = await seen.together(None, "second")
    result["base_first"] = await seen.together(None, "first")
    result["first_second"] = await seen.together("first", "second")
    result["base_first_second"] = await seen.together(None, "first", "second")
    result["base_second_long"] = await seen.together(None, "second", prompt=LONG)
    result["base_then_second"] = await seen.joining(None, "second")

    await seen.remove("second")
    result["slots_after_removal"] = await seen.in_worker(slot_sizes)
    result["base_first_after_removal"] = await seen.together(None, "first")

    result["small"] = [await seen.answer("small")]
    result["base_small_first"] = await seen.together(None, "small", "first")
    await seen.remove("small")

    result["head"] = [await seen.answer("head")]
    result["base_alone_after_head"] = [await seen.answer(None)]
    result["base_head"] = await seen.together(None, "head")
    await seen.remove("head")
    result["base_alone_after_head_removed"] = [await seen.answer(None)]

    result["base_poison"] = await seen.together(None, "poison")
    result["poison"] = [await seen.answer("poison")]
    await seen.remove("poison")
    result["base_after_poison"] = [await seen.answer(None) for _ in range(6)]
    result["base_at_once_after_poison"] = await seen.together(*[None] * 8)
    result["first_after_poison"] = [await seen.answer("first")]
    result["prompt_logprobs_error"] = await prompt_logprobs_error(seen)
    return result


async def prompt_logprobs_error(seen: Observer) -> str | None:
    """Two requests in a batch, one of which asks for the log-probabilities of its prompt. Last: it may end vLLM."""
    asking = [asyncio.create_task(seen.answer(None, prompt, prompt_logprobs=1)) for prompt in (SHORT, OTHER)]
    errors = [error for error in await asyncio.gather(*asking, return_exceptions=True) if isinstance(error, Exception)]
    return type(errors[0]).__name__ if errors else None


async def main(folders: dict[str, str], compiled: bool) -> dict[str, Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=folders.pop("model"),
        quantization="bitsandbytes",
        dtype="bfloat16",
        enforce_eager=not compiled,
        distributed_executor_backend="uni" if compiled else None,
        enable_lora=True,
        max_loras=SLOTS,
        max_cpu_loras=4,
        max_lora_rank=16,
        max_model_len=1024,
        max_num_seqs=16,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=100 << 20,
    )
    engine = AsyncLLM.from_engine_args(arguments)
    try:
        return await observe(Observer(engine, folders))
    finally:
        engine.shutdown()


if __name__ == "__main__":
    seen = asyncio.run(main(json.loads(Path(sys.argv[1]).read_text()), "compiled" in sys.argv[3:]))
    Path(sys.argv[2]).write_text(json.dumps(seen))
