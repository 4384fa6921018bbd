"""Named tensors into a model that computes, and the log-probabilities of a model, in chunks.

The weights come one by one and are cast as they come, so that one model is held and no second copy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from adapters.base import shards_of
from adapters.errors import MergeError
from adapters.merge.tensors import read_tensor
from adapters.processor import multiplies_bf16
from adapters.safetensors_header import read_header
from adapters.train.head_loss import CHUNK_BYTES, head_is_plain, without_head
from adapters.train.labels import IGNORED, Example
from adapters.train.model import Batch, collate

BATCH = 8
NOTHING: Mapping[str, Any] = {}


def dense_model(
    base: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, config_changes: Mapping[str, Any] = NOTHING
) -> Any:
    """The base's architecture with these weights, unquantised whatever the base is."""
    config = AutoConfig.from_pretrained(base, local_files_only=True)
    for key, value in config_changes.items():
        setattr(config, key, value)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    weights = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors}
    model, found = kind.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True)
    wrong = {what: sorted(names)[:3] for what, names in found.items() if names}
    if wrong:
        raise MergeError(f"{base.name} is not the model that its config.json describes: {wrong}", code="not_the_model")
    model.config.use_cache = False
    return model.eval()


def written_model(directory: Path, dtype: torch.dtype) -> Any:
    """From the files of a merge themselves."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    model.config.use_cache = False
    return model.eval()


def tensors_of(directory: Path) -> Iterator[tuple[str, Tensor]]:
    for shard in shards_of(directory):
        for name, span in read_header(shard).items():
            yield name, read_tensor(shard, span)


def compute_type(stored: str) -> torch.dtype:
    """bfloat16 where the weights have no more and the processor multiplies it, else float32."""
    return torch.bfloat16 if stored in ("bfloat16", "nf4") and multiplies_bf16() else torch.float32


def log_probabilities(
    model: Any, examples: Sequence[Example], pad: int, told: Callable[[int], None] = lambda count: None
) -> Iterator[tuple[Tensor, Tensor]]:
    """For chunks of the trained tokens, in order: log-probabilities [tokens, vocabulary] in fp32, and the tokens."""
    causal = getattr(model, "get_base_model", lambda: model)()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    head = causal.get_output_embeddings() if head_is_plain(causal) else None
    rows = max(1, CHUNK_BYTES // (4 * causal.config.get_text_config().vocab_size))
    for start in range(0, len(examples), BATCH):
        batch = collate(examples[start : start + BATCH], pad)
        with without_head(causal) if head else nullcontext():
            found, targets = _kept(model(**batch.inputs).logits, batch)
        for part, wanted in zip(found.split(rows), targets.split(rows), strict=True):
            logits = head(part) if head else part
            yield torch.log_softmax(logits.float(), dim=-1), wanted
            told(len(wanted))


def _kept(found: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    targets = batch.labels[:, 1:]
    kept = targets != IGNORED
    return found[:, :-1][kept], targets[kept]
