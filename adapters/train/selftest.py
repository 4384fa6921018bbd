"""Whether bitsandbytes computes rightly here, tried at the start on the 4-bit layers at hand, one of each shape.

Two kernels of its CPU build do not (adapters/nf4.py). What can be repaired is, and said; with what cannot, no run
starts: its loss would look normal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adapters.errors import TrainError
from adapters.nf4 import TOLERANCE, layer_shapes, reference_dequantize, repair_dequantize, self_test

ROWS = 4


def check_numerics(model: torch.nn.Module) -> tuple[str, ...]:
    """What had to be repaired, in words; raises TrainError for what could not be."""
    notes = _repair(model)
    with torch.random.fork_rng():
        for name, layer in _one_of_each_shape(model):
            _require_right_gradients(name, layer)
    return notes


def _repair(model: torch.nn.Module) -> tuple[str, ...]:
    shapes = layer_shapes(model)
    wrong = self_test(shapes)
    if not wrong:
        return ()
    repair_dequantize()
    still = self_test(shapes)
    if still:
        first = still[0]
        raise TrainError(
            f"bitsandbytes gives 4-bit weights of shape {first.shape} back with a relative error of "
            f"{first.relative_error:.2f}, expected less than {TOLERANCE}; set quantization.load_in_4bit=false or "
            "install another build of bitsandbytes",
            code="wrong_kernel",
        )
    shapes_shown = ", ".join("×".join(map(str, each.shape)) for each in wrong)
    return (f"bitsandbytes misreads 4-bit weights of shape {shapes_shown} here; they are read in another way",)


def _one_of_each_shape(model: torch.nn.Module) -> list[tuple[str, Any]]:
    found: dict[tuple[int, ...], tuple[str, Any]] = {}
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            found.setdefault(tuple(state.shape), (name, module))
    return list(found.values())


def _require_right_gradients(name: str, layer: Any) -> None:
    """Before an evaluation and after it: dy/dx of y = W·x is W, by the definition of the format."""
    state = layer.weight.quant_state
    rows, columns = state.shape
    torch.manual_seed(0)
    outer = torch.randn(ROWS, rows, device=layer.weight.device, dtype=layer.compute_dtype or torch.float32)
    expected = outer.float() @ _weight(layer)
    was_training = layer.training
    for moment in ("before", "after"):
        layer.train()
        x = torch.randn(ROWS, columns, device=outer.device, dtype=outer.dtype, requires_grad=True)
        (got,) = torch.autograd.grad(layer(x), x, outer, allow_unused=True)
        error = 1.0 if got is None else float((got.float() - expected).norm() / expected.norm())
        if not error < 2 * TOLERANCE:
            raise TrainError(
                f"{name}: {moment} an evaluation, the gradient through its 4-bit weight has a relative error of "
                f"{error:.2f}; set quantization.load_in_4bit=false or install another build of bitsandbytes",
                code="wrong_kernel",
            )
        layer.eval()
        with torch.no_grad():
            layer(x.detach())
    layer.train(was_training)


def _weight(layer: Any) -> Tensor:
    from bitsandbytes import functional

    state = layer.weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2).float() + state.offset
    return reference_dequantize(layer.weight.data, absmax, state.code, state.blocksize, state.shape, torch.float32)
