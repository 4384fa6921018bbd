"""The served path computes what transformers + PEFT compute on the same NF4 base.

Both run bf16 kernels of their own, so they agree up to rounding. The tolerance is what the two engines differ by on
the bare base (NF4, no adapter), where no adapter arithmetic is involved: it is measured here, beside the adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from adapters.nf4 import keep_unpacked, repair_dequantize
from tests.flows.live import Live

pytestmark = pytest.mark.engine
PROMPTS = (
    "What is the capital of France?",
    "How do I reset my password?",
    "Why is the sky blue?",
    "My invoice is wrong.",
)
TOKENS = 32
MEAN_TOLERANCE, MAX_TOLERANCE = 0.06, 0.45


@dataclass(frozen=True)
class Served:
    """One greedy answer: its text, token ids, and the log-probability of each."""

    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]
    text: str


class Reference:
    """transformers with bitsandbytes NF4 and PEFT, as their documentation shows."""

    def __init__(self, base: Path, adapters: dict[str, Path]) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        repair_dequantize()
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        model = AutoModelForCausalLM.from_pretrained(
            base, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": "cpu"}
        )
        (first, path), *others = adapters.items()
        self.model: Any = PeftModel.from_pretrained(model, path, adapter_name=first).eval()
        for name, path in others:
            self.model.load_adapter(path, adapter_name=name)
        keep_unpacked(self.model)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base)

    def logprobs(self, adapter: str | None, served: Served) -> list[float]:
        """Log-probability of every served token, teacher-forced."""
        import torch

        ids = torch.tensor([served.prompt_ids + served.ids])
        with torch.no_grad(), self._active(adapter):
            logits = self.model(input_ids=ids).logits[0, len(served.prompt_ids) - 1 : -1].float()
        chosen = torch.log_softmax(logits, -1)[range(len(served.ids)), served.ids]
        return [float(value) for value in chosen]

    def greedy(self, adapter: str | None, served: Served) -> str:
        import torch

        ids = torch.tensor([served.prompt_ids])
        with torch.no_grad(), self._active(adapter):
            out = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS
            )
        text: str = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return text

    def _active(self, adapter: str | None) -> Any:
        from contextlib import nullcontext

        if adapter is None:
            return self.model.disable_adapter()
        self.model.set_adapter(adapter)
        return nullcontext()


@pytest.fixture(scope="module")
def reference(live: Live, demo_adapters: dict[str, Path], random_adapters: dict[str, Path]) -> Iterator[Reference]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Reference(live.base.path, demo_adapters | random_adapters)


def ask(live: Live, model: str, prompt: str) -> Served:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "logprobs": True,
        "return_token_ids": True,
    }
    with live.client() as client:
        answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    choice = answer["choices"][0]
    logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
    return Served(answer["prompt_token_ids"], choice["token_ids"], logprobs, choice["message"]["content"])


def differences(live: Live, reference: Reference, model: str) -> list[float]:
    adapter = None if model == live.base.name else model
    found = []
    for prompt in PROMPTS:
        served = ask(live, model, prompt)
        expected = reference.logprobs(adapter, served)
        found += [abs(a - b) for a, b in zip(served.logprobs, expected, strict=True)]
    return found


@pytest.mark.parametrize("model", ["", "pirate", "ticket", "random4", "random8", "random16"])
def test_served_logprobs_equal_peft_s(live: Live, reference: Reference, model: str) -> None:
    found = differences(live, reference, model or live.base.name)
    mean, largest = sum(found) / len(found), max(found)
    print(f"parity {model or 'base'}: {len(found)} tokens, mean |dlogp| {mean:.4f}, max {largest:.4f}")
    assert mean < MEAN_TOLERANCE
    assert largest < MAX_TOLERANCE


def test_the_tolerance_tells_adapters_apart(live: Live, reference: Reference) -> None:
    """The wrong adapter, and no adapter, are far outside: the test above can fail."""
    served = ask(live, "pirate", PROMPTS[0])
    for wrong in (None, "ticket", "random4"):
        expected = reference.logprobs(wrong, served)
        gaps = [abs(a - b) for a, b in zip(served.logprobs, expected, strict=True)]
        assert sum(gaps) / len(gaps) > 10 * MEAN_TOLERANCE


@pytest.mark.parametrize("model", ["pirate", "ticket"])
def test_greedy_text_is_identical(live: Live, reference: Reference, model: str) -> None:
    for prompt in PROMPTS:
        served = ask(live, model, prompt)
        assert reference.greedy(model, served) == served.text
