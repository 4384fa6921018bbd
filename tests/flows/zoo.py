"""Adapters of every kind and many odd options, made by PEFT itself on the base that is served; none is committed.

Each is built on a fresh copy of the base, every trained parameter moved by random amounts, and saved as PEFT saves it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
QUERY_VALUE = ["q_proj", "v_proj"]
FEW: dict[str, Any] = {"target_modules": QUERY_VALUE, "layers_to_transform": [0, 1, 14, 29]}
"""Where a conversion takes time, or changes much."""
AS_IT_CAME, EXACTLY, WITH_ERROR, MERGE_ONLY = "served as it came", "converted exactly", "converted from", "merge only"


@dataclass(frozen=True)
class Case:
    kind: str
    """PEFT's name of the configuration class."""
    options: Mapping[str, Any]
    verdict: str | None = None
    """How its verdict begins; None: refused."""
    code: str | None = None
    """Why it is refused."""
    strength: float = 0.02
    only: tuple[str, ...] = ()
    """Parts of the names of the parameters that training moves; none: all that are trained."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Of the upload."""
    dtype: str | None = None
    keeps_first: bool = False
    """Whether the adapter before training is uploaded with it."""
    finish: Callable[[Any], None] | None = None
    """What else happens before it is saved."""


def lora(verdict: str | None = AS_IT_CAME, **more: Any) -> Case:
    case = {name: more.pop(name) for name in list(more) if name in Case.__dataclass_fields__}
    return Case("LoraConfig", {"r": 8, "lora_alpha": 16, **more}, verdict, **case)


def other(kind: str, verdict: str | None, **more: Any) -> Case:
    case = {name: more.pop(name) for name in list(more) if name in Case.__dataclass_fields__}
    return Case(f"{kind}Config", more, verdict, **case)


def _halve(model: Any) -> None:
    """The second half of the rank stays unused."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data[:, parameter.shape[1] // 2 :] = 0


def _own_norms(model: Any) -> None:
    """DoRA's magnitudes become the norms that the rows have with B·A: it is a plain LoRA then."""
    for layer in model.modules():
        if getattr(layer, "lora_magnitude_vector", None):
            delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            moved = layer.get_base_layer().weight + layer.scaling["default"] * delta
            layer.lora_magnitude_vector["default"].weight.data = moved.norm(dim=1)


def _decay(model: Any) -> None:
    """Each column counts less than the one before, as training leaves them, and not as random numbers do."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_B", "hada_w1_a", "hada_w2_a", "lokr_w2_a", "vera_lambda_d")):
            parameter.data *= 0.8 ** torch_range(parameter.shape[-1])
        elif "lokr_w1." in name:
            parameter.data *= 0.8 ** torch_range(parameter.shape[1])


def torch_range(count: int) -> Any:
    import torch

    return torch.arange(count)


ADALORA = {"init_r": 6, "target_r": 3, "lora_alpha": 5, "tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 10}

ZOO: dict[str, Case] = {
    # served as it came
    "lora with PEFT's own targets": lora(),
    "lora on all linear layers": lora(target_modules="all-linear", r=16),
    "lora on attention": lora(target_modules=ATTENTION, r=4, lora_alpha=3),
    "lora on the MLP": lora(target_modules=["gate_proj", "up_proj", "down_proj"]),
    "ranks and alphas by pattern": lora(
        target_modules=ATTENTION, rank_pattern={"k_proj": 2, r"layers\.1\d\..*q_proj": 16}, alpha_pattern={"v_proj": 4}
    ),
    "rsLoRA": lora(use_rslora=True, target_modules=ATTENTION),
    "targets by regular expression": lora(target_modules=r".*layers\.\d\.self_attn\.[qv]_proj"),
    "some layers": lora(**FEW),
    "excluded modules": lora(target_modules=ATTENTION, exclude_modules=r".*layers\.[0-9]\..*"),
    "gaussian start": lora(init_lora_weights="gaussian"),
    "orthogonal start": lora(init_lora_weights="orthogonal"),
    "saved in bfloat16": lora(dtype="bfloat16"),
    "saved in float16": lora(dtype="float16"),
    "rank 1": lora(r=1),
    "dropout": lora(lora_dropout=0.3),
    "one module": lora(target_modules=["model.layers.7.mlp.up_proj"], strength=0.1),
    "negative alpha": lora(lora_alpha=-8),
    # converted exactly
    "AdaLoRA": other("AdaLora", EXACTLY, **ADALORA, target_modules=ATTENTION, strength=0.2),
    "PiSSA": lora(EXACTLY, init_lora_weights="pissa", **FEW),
    "PiSSA, fast": lora(EXACTLY, init_lora_weights="pissa_niter_4", keeps_first=True, **FEW),
    "OLoRA": lora(EXACTLY, init_lora_weights="olora", **FEW),
    "LoHa": other("LoHa", EXACTLY, r=4, alpha=8, target_modules=QUERY_VALUE, strength=0.1),
    "LoKr": other("LoKr", EXACTLY, r=4, alpha=8, decompose_both=True, target_modules=QUERY_VALUE, strength=0.1),
    "VeRA": other("Vera", EXACTLY, r=16, target_modules=QUERY_VALUE, save_projection=True, strength=0.5),
    "rank 32, half of it unused": lora(EXACTLY, r=32, finish=_halve, **FEW),
    "biases that stayed zero": lora(EXACTLY, lora_bias=True, only=("lora_A", "lora_B.default.weight"), **FEW),
    "a norm saved along": lora(EXACTLY, modules_to_save=["model.norm"], only=("lora_",), **FEW),
    "DoRA whose magnitudes are the norms": lora(EXACTLY, use_dora=True, finish=_own_norms, **FEW),
    "bias option on a base without biases": lora(EXACTLY, bias="lora_only", **FEW),
    # converted with an error that was accepted
    "DoRA, accepted": lora(WITH_ERROR, use_dora=True, fields={"max_error": "0.5"}, finish=_decay, **FEW),
    "rank 32, accepted": lora(WITH_ERROR, r=32, fields={"max_error": "0.5"}, finish=_decay, **FEW),
    "LoHa of rank 8, accepted": other(
        "LoHa", WITH_ERROR, r=8, alpha=8, strength=0.1, fields={"max_error": "0.5"}, finish=_decay, **FEW
    ),
    "LoKr, accepted": other(
        "LoKr", WITH_ERROR, r=4, alpha=8, strength=0.1, fields={"max_error": "0.5"}, finish=_decay, **FEW
    ),
    "VeRA of rank 64, accepted": other(
        "Vera", WITH_ERROR, r=64, strength=0.5, save_projection=True, fields={"max_error": "0.5"}, finish=_decay, **FEW
    ),
    # merge only
    "DoRA": lora(MERGE_ONLY, use_dora=True, **FEW),
    "IA3": other(
        "IA3", MERGE_ONLY, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "OFT": other("OFT", MERGE_ONLY, r=0, oft_block_size=32, **FEW),
    "BOFT": other("BOFT", MERGE_ONLY, boft_block_size=4, **FEW),
    "HRA": other("HRA", MERGE_ONLY, r=4, **FEW),
    "FourierFT": other("FourierFT", MERGE_ONLY, n_frequency=50, target_modules=QUERY_VALUE, strength=5.0),
    "a trained norm": lora(MERGE_ONLY, modules_to_save=["model.norm"], **FEW),
    "LoRA on the embedding": lora(MERGE_ONLY, target_modules=["embed_tokens"]),
    "LoRA on the head": lora(MERGE_ONLY, target_modules=["lm_head"]),
    "trained tokens": lora(MERGE_ONLY, trainable_token_indices=[5, 6]),
    # refused
    "trained biases of lora_B": lora(None, code="not_mergeable", lora_bias=True, **FEW),
    "rank 32": lora(None, code="rank_too_large", r=32, **FEW),
    "PiSSA, fast, without its start": lora(None, code="modified_base", init_lora_weights="pissa_niter_4", **FEW),
    "prompt tuning": other("PromptTuning", None, code="changes_prompt", num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix tuning": other("PrefixTuning", None, code="changes_prompt", num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "P-tuning": other("PromptEncoder", None, code="changes_prompt", num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "activated LoRA": lora(None, code="alora", alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"),
}


def make(case: Case, base: Any, directory: Path) -> Any:
    """The PEFT model, saved in `directory`. `base`: a transformers model, which stays as it is."""
    import peft
    import torch

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), getattr(peft, case.kind)(**case.options)).eval()
        if case.keeps_first:
            model.save_pretrained(directory.with_name("first"))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (not case.only or any(part in name for part in case.only)):
                parameter.data += case.strength * torch.randn_like(parameter)
        if case.finish is not None:
            case.finish(model)
        if case.dtype is not None:
            _round(model, getattr(torch, case.dtype))
        model.save_pretrained(directory)
    if case.dtype is not None:
        _save_as(directory / "adapter_model.safetensors", getattr(torch, case.dtype))
    if case.keeps_first:
        first = directory.with_name("first") / "adapter_model.safetensors"
        first.rename(directory / "initial_adapter_model.safetensors")
    return model


def _round(model: Any, dtype: Any) -> None:
    """To values that `dtype` holds, so that what is compared and what is saved are the same."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype).float()


def _save_as(path: Path, dtype: Any) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: each.to(dtype) for name, each in load_file(path).items()}, path, metadata={"format": "pt"})
