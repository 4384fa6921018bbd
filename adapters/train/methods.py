"""A base and a configuration → the model under training: what peft builds for each method.

It knows nothing of data or schedules; AdaLoRA is told how many steps there will be.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.tuners.ia3 import IA3Layer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from peft.utils.warning import PeftWarning
from safetensors.torch import save_file
from torch import Tensor

from adapters.base import BaseModel
from adapters.errors import ConfigError
from adapters.train.inits import begin_orthogonal, begin_with_what_nf4_lost
from adapters.train.method_sections import PeftSection
from adapters.upload import INITIAL

TAKEN_FROM_THE_BASE = ("pissa", "olora")
OURS = ("orthogonal", "loftq")
"""Initialisations that peft would not do on NF4, or not on a CPU."""
SCALED_BEFORE = ("down_proj",)
"""Where IA³ scales what goes in, as in its paper; elsewhere what comes out."""


def attach(base: Any, section: PeftSection, steps: int, directory: Path) -> Any:
    """The base with a fresh adapter, its weights in fp32. LoftQ reads the base's weights from `directory` again."""
    model = get_peft_model(base, CONFIGS[section.method](section, steps))
    if section.method not in ("prompt", "prefix"):
        _require_any(model, section)
    if section.init_lora_weights == "orthogonal":
        begin_orthogonal(model)
    if section.init_lora_weights == "loftq":
        begin_with_what_nf4_lost(model, BaseModel.read(directory))
    if section.init_lora_weights in TAKEN_FROM_THE_BASE:
        model.began_with = _snapshot(model)  # on the model, because every evaluation of the base needs it
    if section.method == "ia3":
        _keep_types(model)
    return model


@contextmanager
def base_alone(model: Any) -> Iterator[None]:
    """The model as the untouched base: with its adapter off, or, where that took a part of the base, as it began."""
    began = _began_with(model)
    if began is None:
        with model.disable_adapter():
            yield
        return
    now = _snapshot(model)
    _put(model, began)
    try:
        yield
    finally:
        _put(model, now)


def save(model: Any, base_name: str, directory: Path) -> None:
    """As peft does; and what the adapter began with, where that was taken out of the base: without it nobody could tell
    what it changes of the base as it is served."""
    model.peft_config["default"].base_model_name_or_path = base_name
    with warnings.catch_warnings():
        # AdaLoRA may take every rank of a module away; peft takes that for a shard of a larger matrix.
        warnings.filterwarnings("ignore", message=".*have invalid shape", category=PeftWarning)
        model.save_pretrained(directory, save_embedding_layers=False)  # `auto` would ask a model hub
    if _began_with(model) is not None:
        with base_alone(model):
            state = get_peft_model_state_dict(model, save_embedding_layers=False)
            tensors = {name: tensor.clone().contiguous() for name, tensor in state.items()}
        save_file(tensors, directory / INITIAL, metadata={"format": "pt"})


def parameter_count(model: torch.nn.Module) -> int:
    """As if nothing were packed."""
    states = ((parameter, getattr(parameter, "quant_state", None)) for parameter in model.parameters())
    return sum(parameter.numel() if state is None else state.shape.numel() for parameter, state in states)


def _lora(section: PeftSection, steps: int) -> LoraConfig:
    init = section.init_lora_weights
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=section.r,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        target_modules=section.modules_for_peft(),
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        rank_pattern=dict(section.rank_pattern),
        alpha_pattern=dict(section.alpha_pattern),
        init_lora_weights=True if init in ("default", *OURS) else init,
    )


def _adalora(section: PeftSection, steps: int) -> AdaLoraConfig:
    own = section.adalora
    try:
        tinit, tfinal, delta = own.schedule(steps)
    except ValueError as error:
        raise ConfigError(f"peft.adalora: {error}") from None
    return AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=own.init_r,
        target_r=own.target_r,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        target_modules=section.modules_for_peft(),
        tinit=tinit,
        tfinal=tfinal,
        deltaT=delta,
        total_step=steps,
        beta1=own.beta1,
        beta2=own.beta2,
        orth_reg_weight=own.orth_reg_weight,
    )


def _ia3(section: PeftSection, steps: int) -> IA3Config:
    targets = section.modules_for_peft()
    before = [name for name in SCALED_BEFORE if isinstance(targets, str) or name in targets]
    return IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=before)


def _prompt(section: PeftSection, steps: int) -> PromptTuningConfig:
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=section.num_virtual_tokens)


def _prefix(section: PeftSection, steps: int) -> PrefixTuningConfig:
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=section.num_virtual_tokens)


CONFIGS: Mapping[str, Callable[[PeftSection, int], Any]] = {
    "lora": _lora,
    "qlora": _lora,
    "adalora": _adalora,
    "ia3": _ia3,
    "prompt": _prompt,
    "prefix": _prefix,
}


def _require_any(model: torch.nn.Module, section: PeftSection) -> None:
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ConfigError(f"peft.target_modules={section.target_modules}: the base has no module of these names")


def _keep_types(model: torch.nn.Module) -> None:
    """Or peft's IA³ makes the outputs of a 4-bit layer as wide as its vectors, and the next layer fails."""
    for module in model.modules():
        if isinstance(module, IA3Layer):
            module.register_forward_hook(lambda layer, inputs, output: output.to(inputs[0].dtype))


def _began_with(model: Any) -> Mapping[str, Tensor] | None:
    return getattr(model, "began_with", None)


def _snapshot(model: torch.nn.Module) -> Mapping[str, Tensor]:
    named = model.named_parameters()
    return {name: parameter.detach().clone() for name, parameter in named if parameter.requires_grad}


def _put(model: torch.nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.data.copy_(values[name])
