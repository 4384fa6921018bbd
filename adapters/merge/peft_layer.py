"""Kinds that a LoRA does not come near, merged by PEFT's own layer: one linear module at a time, never the whole model.

What PEFT expects of the file is found by building the layer without memory (torch's meta device).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from adapters.convert.multiplying import multiplying
from adapters.convert.source import Parts, Source
from adapters.refusals import refuse

if TYPE_CHECKING:
    import torch

Compute = Callable[["torch.Tensor"], "torch.Tensor"]
THROUGH_PEFT = ("IA3", "OFT", "BOFT", "HRA", "FOURIERFT")
NEEDS_MEMORY = ("BOFT",)
"""Their layers cannot be built on the meta device."""
TROUBLE = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, AssertionError)
"""What PEFT raises for options of other types or values than it expects."""
WHERE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
"""Options that say which modules it is put on; the file says that."""
MOST: Mapping[str, int] = {"num_cayley_neumann_terms": 64, "boft_n_butterfly_factor": 64}
"""Options that PEFT loops over, however large they are."""
UNUSED = ("auto_mapping", "task_type", "base_model_name_or_path", "revision", "peft_version", "runtime_config")


def multiplied(source: Source) -> Mapping[str, Compute]:
    """Module → its merge. Raises InvalidAdapter where the file is not what PEFT would read."""
    multiplying(source)
    for option, most in MOST.items():
        value = source.config.get(option, 1)
        if type(value) is not int or not 0 <= value <= most:
            raise refuse("bad_config", f"{option} is {str(value)[:120]!r}, expected a whole number up to {most}")
    found: dict[str, dict[str, Any]] = {}
    for name, span in source.spans.items():
        module = _module_of(name, source)
        found.setdefault(module, {})[name] = span
    for module, parts in found.items():
        _require_expected(source, module, parts)
    return {module: partial(_merged, source, module, parts) for module, parts in found.items()}


def _module_of(name: str, source: Source) -> str:
    parts = name.split(".")
    return next(above for end in range(1, len(parts)) if (above := ".".join(parts[:end])) in source.base.modules)


def _require_expected(source: Source, module: str, parts: Parts) -> None:
    device = "cpu" if source.kind in NEEDS_MEMORY else "meta"
    with _quiet(), _told(source, module, (*TROUBLE, RuntimeError)):
        expected = _expected(source, module, device)
    got = {name: span.shape for name, span in parts.items()}
    if got != expected:
        raise refuse("shape_mismatch", f"{module}: the file has {got}, PEFT expects {expected}")


def _expected(source: Source, module: str, device: str) -> dict[str, tuple[int, ...]]:
    from peft.utils import get_peft_model_state_dict

    root = _with_layer(source, module, None, device)
    return {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(root).items()}


def _merged(source: Source, module: str, parts: Parts, weight: torch.Tensor) -> torch.Tensor:
    import torch
    from peft.utils import set_peft_model_state_dict

    values = {name: torch.from_numpy(source.values(span)) for name, span in parts.items()}
    with _quiet(), _told(source, module, TROUBLE), torch.no_grad():
        root = _with_layer(source, module, weight, "cpu")
        set_peft_model_state_dict(root, values)
        layer = root.get_submodule(module)
        layer.merge()
        found: torch.Tensor = layer.get_base_layer().weight.data
    return found


def _with_layer(source: Source, module: str, weight: torch.Tensor | None, device: str) -> Any:
    """A model of nothing but this module, under its own name, with the adapter on it."""
    import torch
    from peft import inject_adapter_in_model

    rows, columns = source.base.modules[module]
    *path, last = module.split(".")
    root = parent = torch.nn.Module()
    for name in path:
        child = torch.nn.Module()
        parent.add_module(name, child)
        parent = child
    with torch.device("meta" if weight is not None else device):
        linear = torch.nn.Linear(columns, rows, bias=False)
    if weight is not None:
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    parent.add_module(last, linear)
    with torch.device(device):
        return inject_adapter_in_model(_config(source, module), root)


def _config(source: Source, module: str) -> Any:
    from peft import get_peft_config

    kept = {key: value for key, value in source.config.items() if key not in (*WHERE, *UNUSED)}
    if source.kind == "IA3":  # a row of factors scales what goes in, a column what comes out
        before = source.spans[f"{module}.ia3_l"].shape == (1, source.base.modules[module][1])
        kept["feedforward_modules"] = [module] if before else []
    return get_peft_config({**kept, "peft_type": source.kind, "target_modules": [module], "inference_mode": True})


@contextmanager
def _told(source: Source, module: str, trouble: tuple[type[Exception], ...]) -> Iterator[None]:
    try:
        yield
    except trouble as error:
        raise refuse("bad_config", f"PEFT cannot put this {source.kind} on {module}: {error!r:.300}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """PEFT warns of options that matter to training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
