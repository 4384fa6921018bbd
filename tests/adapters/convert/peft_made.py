"""Adapters of any kind for the tiny base, made and saved by PEFT itself, with what they change of every weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapters.base import BaseModel
from adapters.base_weights import BaseWeights
from adapters.tensor_values import Matrix


def model_of(base: BaseModel) -> Any:
    """The base as torch modules of the same names and weights, in fp32; with a norm and a head beside them."""
    import torch

    weights = BaseWeights(base)
    root = torch.nn.Module()
    for module in base.modules:
        *path, last = module.split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                setattr(parent, part, torch.nn.Module())
            parent = getattr(parent, part)
        weight = torch.tensor(weights.weight(module))
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight
        setattr(parent, last, linear)
    root.model.norm = torch.nn.LayerNorm(8, bias=False)
    root.model.norm.weight.data = torch.tensor(weights.values("model.norm.weight"))
    return root


def save(
    base: BaseModel,
    config: Any,
    directory: Path,
    *,
    train: Callable[[Any], None] | None = None,
    **saving: Any,
) -> Mapping[str, Matrix]:
    """Every trained parameter moved by random amounts, or as `train` has it. Module → ΔW against the untouched base."""
    import torch
    from peft import get_peft_model

    torch.manual_seed(0)
    before = {module: BaseWeights(base).weight(module) for module in base.modules}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model_of(base), config)
        (train or move)(model)
        model.save_pretrained(directory, **saving)
        if getattr(config, "lora_bias", False):  # PEFT does not merge it into a layer without a bias
            layers = {module: model.base_model.model.get_submodule(module) for module in base.modules}
            return {module: layer.get_delta_weight("default").detach().numpy() for module, layer in layers.items()}
        merged = model.merge_and_unload()
    after = {module: merged.get_submodule(module).weight.detach().numpy() for module in base.modules}
    return {module: np.asarray(after[module] - before[module]) for module in base.modules}


def move(model: Any, strength: float = 0.3) -> None:
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += strength * torch.randn_like(parameter)
