"""Named tensors into a model that computes, and the log-probabilities of a model, in chunks.

Here a model is whole in memory: its weights come one by one and are cast as they come, so that one model is held and no
second copy of it. layers.py has the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from adapters.errors import MergeError
from adapters.merge.named_tensors import NamedTensors
from adapters.merge.unmerged import with_adapter
from adapters.processor import multiplies_bf16
from adapters.train.head_loss import head_is_plain, without_head
from adapters.train.labels import IGNORED, Example
from adapters.train.model import Batch, collate

BATCH_TOKENS = 1024
"""Of rows side by side, padding and all."""
CHUNK_BYTES = 16 << 20
"""Of fp32 logits held at once."""
COMPARED_BYTES = 1 << 20
"""Of them that are compared at once, which takes five times that."""
NOTHING: Mapping[str, Any] = {}

Heard = Callable[[int, int], None]
"""How much of a model's work is done, and how much there is."""


@dataclass(frozen=True)
class Loaded:
    model: Any
    head_is_plain: bool
    """Whether logits are what the head makes of the hidden states, no more."""
    passes: Callable[[Sequence[Callable[[], Any]], Heard], Iterator[Any]]
    """Calls of the model, into their results in order."""


class Loading(Protocol):
    """A way to have a model."""

    def of(
        self,
        directory: Path,
        tensors: NamedTensors,
        dtype: torch.dtype,
        config_changes: Mapping[str, Any] = NOTHING,
        adapter: Path | None = None,
    ) -> Loaded:
        """The architecture of `directory` with these weights, unquantised whatever lies there; `adapter` on top."""

    def written(self, directory: Path, dtype: torch.dtype) -> Loaded:
        """From the files of a merge themselves."""


class Whole:
    """All of its weights at once."""

    def of(
        self,
        directory: Path,
        tensors: NamedTensors,
        dtype: torch.dtype,
        config_changes: Mapping[str, Any] = NOTHING,
        adapter: Path | None = None,
    ) -> Loaded:
        model = dense_model(directory, tensors, dtype, config_changes)
        return _loaded(model if adapter is None else with_adapter(model, adapter, directory))

    def written(self, directory: Path, dtype: torch.dtype) -> Loaded:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
        model.config.use_cache = False
        return _loaded(model)


def _loaded(model: Any) -> Loaded:
    return Loaded(model, head_is_plain(causal_of(model)), _one_by_one)


def _one_by_one(calls: Sequence[Callable[[], Any]], heard: Heard) -> Iterator[Any]:
    for number, call in enumerate(calls, start=1):
        yield call()
        heard(number, len(calls))


def causal_of(model: Any) -> Any:
    """Without what PEFT puts around it."""
    return getattr(model, "get_base_model", lambda: model)()


def dense_model(
    base: Path, tensors: NamedTensors, dtype: torch.dtype, config_changes: Mapping[str, Any] = NOTHING
) -> Any:
    """The base's architecture with these weights, unquantised whatever the base is."""
    config = dense_config(base, config_changes)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    weights = {name: cast(tensor, dtype) for name, tensor in tensors.items()}
    model, found = kind.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True)
    wrong = {what: sorted(names)[:3] for what, names in found.items() if names}
    if wrong:
        raise MergeError(f"{base.name} is not the model that its config.json describes: {wrong}", code="not_the_model")
    model.config.use_cache = False
    return model.eval()


def dense_config(base: Path, config_changes: Mapping[str, Any] = NOTHING) -> Any:
    config = AutoConfig.from_pretrained(base, local_files_only=True)
    for key, value in config_changes.items():
        setattr(config, key, value)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def compute_type(stored: str) -> torch.dtype:
    """bfloat16 where the weights have no more and the processor multiplies it, else float32."""
    return torch.bfloat16 if stored in ("bfloat16", "nf4") and multiplies_bf16() else torch.float32


def log_probabilities(
    loaded: Loaded,
    texts: Mapping[str, Sequence[Example]],
    pad: int,
    heard: Heard = lambda done, of: None,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """For chunks of the trained tokens, in order: whose text, log-probabilities [tokens, words] in fp32, tokens."""
    causal = causal_of(loaded.model)
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    batches = [(name, batch) for name, examples in texts.items() for batch in _batches(examples, pad)]
    words = causal.config.get_text_config().vocab_size
    rows, few = (max(1, size // (4 * words)) for size in (CHUNK_BYTES, COMPARED_BYTES))
    calls = [partial(_kept, loaded.model, batch) for _, batch in batches]
    with without_head(causal) if loaded.head_is_plain else nullcontext() as head:
        for (name, _), (found, targets) in zip(batches, loaded.passes(calls, heard), strict=True):
            for part, wanted in zip(found.split(rows), targets.split(rows), strict=True):
                logits = head(part) if head else part
                for some, tokens in zip(logits.split(few), wanted.split(few), strict=True):
                    yield name, torch.log_softmax(some.float(), dim=-1), tokens


def _batches(examples: Sequence[Example], pad: int) -> Iterator[Batch]:
    side_by_side: list[Example] = []
    for example in examples:
        width = max(len(each.ids) for each in (*side_by_side, example))
        if side_by_side and (len(side_by_side) + 1) * width > BATCH_TOKENS:
            yield collate(side_by_side, pad)
            side_by_side = []
        side_by_side.append(example)
    if side_by_side:
        yield collate(side_by_side, pad)


def _kept(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of the places whose next token was trained: logits, or the hidden states that the head would get."""
    found = model(**batch.inputs).logits
    targets = batch.labels[:, 1:]
    kept = targets != IGNORED
    return found[:, :-1][kept], targets[kept]
