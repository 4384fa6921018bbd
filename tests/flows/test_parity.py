"""The served path computes what transformers + PEFT compute.

In fp32, where rounding hides nothing, they agree to 1e-3 and write the same text. On the NF4 base both compute in
bf16 with kernels of their own; there the tolerance is what the two differ by on the bare base, where no adapter
arithmetic is involved (measured: mean 0.034 to 0.038, largest 0.22).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from adapters.base import BaseModel
from adapters.nf4 import keep_unpacked, repair_dequantize
from loadtests.synthetic import write_adapter
from server.launch import launch
from tests.flows.live import KEY, Live

pytestmark = pytest.mark.engine
PROMPTS = (
    "What is the capital of France?",
    "How do I reset my password?",
    "Why is the sky blue?",
    "My invoice is wrong.",
)
TOKENS = 32
MEAN_TOLERANCE, MAX_TOLERANCE = 0.05, 0.35
FP32_TOLERANCE = 1e-3
RANKS = (4, 8, 16)
MODELS = ("", "pirate", "ticket", "mild4", "mild8", "mild16")


@dataclass(frozen=True)
class Served:
    """One greedy answer: the token ids of prompt and answer, and the log-probability of each answered one."""

    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]


class Reference:
    """transformers and PEFT, as their documentation shows; `nf4` as the server quantises, else fp32."""

    def __init__(self, base: Path, adapters: dict[str, Path], *, nf4: bool) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        repair_dequantize()
        options = _nf4() if nf4 else {"dtype": torch.float32}
        model = AutoModelForCausalLM.from_pretrained(base, **options)
        (first, path), *others = adapters.items()
        self.model: Any = PeftModel.from_pretrained(model, path, adapter_name=first).eval()
        for name, path in others:
            self.model.load_adapter(path, adapter_name=name)
        keep_unpacked(self.model)

    def logprobs(self, adapter: str | None, served: Served) -> list[float]:
        """Log-probability of every served token, teacher-forced."""
        import torch

        ids = torch.tensor([served.prompt_ids + served.ids])
        with torch.no_grad(), self._active(adapter):
            logits = self.model(input_ids=ids).logits[0, len(served.prompt_ids) - 1 : -1].float()
        chosen = torch.log_softmax(logits, -1)[range(len(served.ids)), served.ids]
        return [float(value) for value in chosen]

    def greedy(self, adapter: str | None, served: Served) -> list[int]:
        import torch

        ids = torch.tensor([served.prompt_ids])
        with torch.no_grad(), self._active(adapter):
            out = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS
            )
        return [int(token) for token in out[0, ids.shape[1] :]]

    def _active(self, adapter: str | None) -> Any:
        if adapter is None:
            return self.model.disable_adapter()
        self.model.set_adapter(adapter)
        return nullcontext()


def _nf4() -> dict[str, Any]:
    import torch
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": quantization, "dtype": torch.bfloat16, "device_map": {"": "cpu"}}


@pytest.fixture(scope="module")
def mild(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """About as strong as trained ones. The flows' strong random adapters blow rounding up as much as the answer."""
    root = tmp_path_factory.mktemp("mild")
    return {f"mild{r}": write_adapter(root / str(r), base, rank=r, seed=r, strength=0.12) for r in RANKS}


@pytest.fixture(scope="module")
def reference(live: Live, demo_adapters: dict[str, Path], mild: dict[str, Path]) -> Reference:
    for name, path in mild.items():
        assert live.upload(name, path).status_code == 201
    return make_reference(live, demo_adapters | mild, nf4=True)


@pytest.fixture(scope="module")
def adapters(demo_adapters: dict[str, Path], random_adapters: dict[str, Path]) -> dict[str, Path]:
    return demo_adapters | random_adapters


@pytest.fixture(scope="module")
def exact(base: BaseModel, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The same base and adapters, unquantised, all in fp32."""
    root = tmp_path_factory.mktemp("fp32")
    flags = ["--model", str(base.path), "--data-dir", str(root / "data"), f"--api-keys=admin:{KEY}"]
    with launch([*flags, "--quantization", "none", "--dtype", "float32", "--max-loras", "2"], root / "log") as server:
        server.wait_ready()
        running = Live(server, base)
        for name, path in adapters.items():
            assert running.upload(name, path).status_code == 201
        yield running


@pytest.fixture(scope="module")
def exact_reference(exact: Live, adapters: dict[str, Path]) -> Reference:
    return make_reference(exact, adapters, nf4=False)


def make_reference(live: Live, adapters: dict[str, Path], *, nf4: bool) -> Reference:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Reference(live.base.path, adapters, nf4=nf4)


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
    return Served(answer["prompt_token_ids"], choice["token_ids"], logprobs)


def differences(reference: Reference, model: str, answers: list[Served]) -> list[float]:
    """|Δ log-probability| of every token of `answers`; model "" is the base."""
    found = []
    for served in answers:
        expected = reference.logprobs(model or None, served)
        found += [abs(a - b) for a, b in zip(served.logprobs, expected, strict=True)]
    return found


@pytest.mark.parametrize("model", MODELS)
def test_served_logprobs_equal_peft_s(live: Live, reference: Reference, model: str) -> None:
    found = differences(reference, model, [ask(live, model or live.base.name, prompt) for prompt in PROMPTS])
    mean, largest = sum(found) / len(found), max(found)
    print(f"parity {model or 'base'}: {len(found)} tokens, mean |dlogp| {mean:.4f}, max {largest:.4f}")
    assert mean < MEAN_TOLERANCE
    assert largest < MAX_TOLERANCE


def test_the_tolerance_tells_adapters_apart(live: Live, reference: Reference) -> None:
    """The wrong adapter, and no adapter, are far outside: the test above can fail."""
    served = ask(live, "pirate", PROMPTS[0])
    for wrong in (None, "ticket", "mild4"):
        expected = reference.logprobs(wrong, served)
        gaps = [abs(a - b) for a, b in zip(served.logprobs, expected, strict=True)]
        assert sum(gaps) / len(gaps) > 10 * MEAN_TOLERANCE
    for name in ("mild4", "mild8", "mild16"):
        served = ask(live, name, PROMPTS[0])
        gaps = [abs(a - b) for a, b in zip(served.logprobs, reference.logprobs(None, served), strict=True)]
        print(f"{name} against the base: mean |dlogp| {sum(gaps) / len(gaps):.3f}")
        assert sum(gaps) / len(gaps) > 2 * MEAN_TOLERANCE


@pytest.mark.parametrize("model", ["", "pirate", "ticket", "random16"])
def test_in_fp32_logprobs_and_greedy_text_are_the_same(exact: Live, exact_reference: Reference, model: str) -> None:
    answers = [ask(exact, model or exact.base.name, prompt) for prompt in PROMPTS]
    found = differences(exact_reference, model, answers)
    print(f"parity fp32 {model or 'base'}: {len(found)} tokens, max |dlogp| {max(found):.2e}")
    assert max(found) < FP32_TOLERANCE
    for served in answers:
        assert exact_reference.greedy(model or None, served) == served.ids
