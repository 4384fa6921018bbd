"""The seam between a model on disk and what is measured of it: by transformers, or by whoever loads exports.

The one for GGUF is in llama_cpp.py; this one loads what Hugging Face's format holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from adapters.base import shards_of
from adapters.errors import NotTheSame
from adapters.merge.unmerged import with_adapter
from adapters.nf4 import keep_unpacked, repair_dequantize
from adapters.safetensors_header import read_header
from adapters.tensor_values import Matrix

LOADING = (OSError, ValueError, RuntimeError, KeyError)
"""What transformers raises for a directory that it cannot read."""


class Reader(Protocol):
    """A model that is loaded."""

    def tokens(self, text: str) -> list[int]:
        """With the token that begins every text, where there is one."""

    def rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A chat through the chat template, to be answered; without the token that is put before every text anyway."""

    def rows(self, tokens: Sequence[int], places: Sequence[int]) -> Matrix:
        """[places, vocabulary]: log-probabilities of what stands at each place, from all before it."""

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """At most so many tokens of an answer, without the one that ends it."""


class TransformersReader:
    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer

    def tokens(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer(text).input_ids]

    def rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        found = str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        begins = self._tokenizer.bos_token
        return found.removeprefix(begins) if begins and self.tokens("a")[0] == self._tokenizer.bos_token_id else found

    def rows(self, tokens: Sequence[int], places: Sequence[int]) -> Matrix:
        before = torch.tensor([place - 1 for place in places])
        with torch.inference_mode():
            logits = self._model(torch.tensor([list(tokens)]), logits_to_keep=before).logits[0]
            found: Matrix = torch.log_softmax(logits.float(), dim=-1).numpy()
        return found

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        ids = torch.tensor([list(tokens)])
        settings = {"max_new_tokens": count, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        with torch.inference_mode():
            made = self._model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **settings)[0]
        answer = [int(token) for token in made[len(tokens) :]]
        ends = self._model.generation_config.eos_token_id
        stops = ends if isinstance(ends, list) else [ends]
        return answer[:-1] if answer and answer[-1] in stops else answer


def load(model: Path, adapter: Path | None = None) -> TransformersReader:
    """A Hugging Face directory, packed in NF4 or not, as transformers itself loads it; `adapter`: unmerged on top, as
    PEFT computes it. Raises NotTheSame."""
    from transformers import AutoModelForCausalLM

    repair_dequantize()
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            model, dtype=_computed_in(model), local_files_only=True, output_loading_info=True
        )
        tokenizer = load_tokenizer(model)
    except LOADING as error:
        raise NotTheSame(f"transformers cannot load {model.name}: {error}", code="not_loaded") from error
    wrong = {what: sorted(names)[:3] for what, names in report.items() if names}
    if wrong:
        raise NotTheSame(
            f"transformers finds other tensors in {model.name} than it expects: {wrong}", code="not_loaded"
        )
    keep_unpacked(loaded)
    return TransformersReader(with_adapter(loaded, adapter, model) if adapter else loaded.eval(), tokenizer)


def load_gguf(path: Path, source: Path) -> TransformersReader:
    """By transformers' own reader of GGUF, where there is no llama.cpp. It reads some tokenizers wrongly, so texts are
    cut by the source's. Raises NotTheSame."""
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
        )
    except LOADING as error:
        raise NotTheSame(f"transformers cannot load {path.name}: {error}", code="not_loaded") from error
    return TransformersReader(loaded.eval(), load_tokenizer(source))


def load_tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, local_files_only=True)


def _computed_in(model: Path) -> torch.dtype:
    """float32, but for what would not fit in half of the memory."""
    from adapters.train.memory import limit_bytes

    values = sum(math.prod(span.shape) for shard in shards_of(model) for span in read_header(shard).values())
    return torch.float32 if 4 * values < limit_bytes() / 2 else torch.bfloat16
