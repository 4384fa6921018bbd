"""Initialisations of a LoRA that leave the base alone and that peft would not do on NF4: orthogonal and LoftQ.

peft casts an orthogonal one to the type of the base's weights, which NF4 keeps in bytes; its LoftQ asks for a GPU and
replaces the base's weights. What begins this way is saved as a plain LoRA, which it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight

from adapters.base import WEIGHT, BaseModel
from adapters.base_weights import BaseWeights
from adapters.convert.change import fit
from adapters.convert.source import PREFIX
from adapters.errors import ConfigError

ADAPTER = "default"


def begin_orthogonal(model: Any) -> None:
    """A = (R·Q_odd)ᵀ/10 and B = R'·Q_even/10, from the odd and even rows of one orthogonal matrix: B·A = 0, and yet
    neither is zero. As peft 0.21 has it, in fp32."""
    for _, layer in _layers(model):
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        rank = a.shape[0]
        q = torch.linalg.qr(torch.randn(rank, rank))[0]
        a.data.copy_((torch.randn(a.shape[1], rank // 2) @ q[0::2]).T / 10)
        b.data.copy_(torch.randn(b.shape[0], rank // 2) @ q[1::2] / 10)


def begin_with_what_nf4_lost(model: Any, base: BaseModel) -> None:
    """s·B·A = the nearest of its rank to W - NF4(W) (LoftQ with one iteration, Li et al. 2023).

    NF4(W) is the base as it is served; more iterations would quantise something else than W.
    """
    weights = BaseWeights(base)
    for name, layer in _layers(model):
        if not weights.is_plain(name + WEIGHT):
            raise ConfigError(
                f"peft.init_lora_weights=loftq: {name} is quantised in the checkpoint itself, and what that lost is "
                "not known; give the base in 16 or 32 bits, or another initialisation"
            )
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        kept = dequantize_module_weight(layer.get_base_layer()).float().cpu().numpy()
        lost = fit(weights.weight(name) - kept, a.shape[0]).factors
        a.data.copy_(torch.from_numpy(lost.a))
        b.data.copy_(torch.from_numpy(lost.b) / layer.scaling[ADAPTER])


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """With their names in the base."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix(PREFIX), module
