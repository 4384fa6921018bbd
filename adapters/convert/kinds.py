"""AdaLoRA, LoHa, LoKr, VeRA: what each of them adds to a weight, from its own tensors alone.

The formulas are those of PEFT 0.21 (`tuners/<kind>/layer.py`, `get_delta_weight`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from adapters.convert.change import Change, Factors
from adapters.convert.plan import Plan
from adapters.convert.source import Parts, Source, require_parts, require_shapes
from adapters.peft_config import read_scaling
from adapters.refusals import refuse
from adapters.tensor_values import Matrix

ADALORA = re.compile(r"(?P<module>.+)\.lora_(?P<part>[ABE])")
LOHA = re.compile(r"(?P<module>.+)\.hada_(?P<part>w[12]_[ab]|t[12])")
LOKR = re.compile(r"(?P<module>.+)\.lokr_(?P<part>w[12](?:_[ab])?|t2)")
VERA = re.compile(r"(?P<module>.+)\.vera_(?P<part>lambda_[bd])")
EPSILON = 1e-5
"""PEFT's AdaLoRA adds it to the rank that it divides by (tuners/adalora/layer.py)."""
LARGEST_RANK = 4096


def adalora(source: Source) -> Plan:
    """ΔW = s·B·diag(λ)·A with s = lora_alpha / (init_r + 1e-5), also after ranks were taken away (Zhang et al. 2023).

    With g = √(s·|λ|) that is the LoRA of g·A and B·(sign λ · g).
    """
    scale = _adalora_scale(source)
    modules = source.modules(ADALORA, "an AdaLoRA")
    changes: dict[str, Callable[[], Change]] = {}
    for module, parts in modules.items():
        require_parts(module, parts, "ABE")
        a, b, e = (parts[part].shape for part in "ABE")
        if not (len(a) == len(b) == len(e) == 2 and a[0] == b[1] == e[0] and e[1] == 1):
            raise refuse("rank_mismatch", f"{module[:200]!r}: A is {a}, B is {b}, E is {e}")
        _require_fit(source, module, b[0], a[1])
        if e[0]:
            changes[module] = partial(_adalora_change, source, parts, scale)
    if not changes:
        raise refuse("no_modules", "AdaLoRA took every rank of every module away")
    return Plan("adalora", changes, {"modules_without_rank": len(modules) - len(changes)})


def _adalora_scale(source: Source) -> float:
    alpha, rank = source.config.get("lora_alpha"), source.config.get("init_r")
    if type(rank) is not int or not 1 <= rank <= LARGEST_RANK:
        raise refuse("bad_config", f"init_r is {str(rank)[:120]!r}, expected a whole number of at least 1")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha <= 1e9:
        raise refuse("bad_scaling", f"lora_alpha is {str(alpha)[:120]!r}, expected more than 0 and at most 1e9")
    return float(alpha) / (rank + EPSILON)


def _adalora_change(source: Source, parts: Parts, scale: float) -> Factors:
    a, b, singular = (source.values(parts[part]) for part in "ABE")
    root = np.sqrt(np.abs(singular[:, 0]) * np.float32(scale))
    return Factors(b * (np.sign(singular[:, 0]) * root), root[:, None] * a)


def loha(source: Source) -> Plan:
    """ΔW = s·(W1a·W1b) ⊙ (W2a·W2b) with s = alpha/r (Hyeon-Woo et al. 2022): of rank at most r²."""
    scaling = read_scaling(source.config, "alpha")
    changes: dict[str, Callable[[], Change]] = {}
    for module, parts in source.modules(LOHA, "a LoHa").items():
        require_parts(module, parts, ("w1_a", "w1_b", "w2_a", "w2_b"))
        rank, (rows, columns) = scaling.rank_of(module), source.base.modules[module]
        shapes = {
            f"{w}_{side}": (rows, rank) if side == "a" else (rank, columns) for w in ("w1", "w2") for side in "ab"
        }
        require_shapes(module, parts, shapes)
        changes[module] = partial(_loha_change, source, parts, scaling.scaling_of(module))
    return Plan("loha", changes, merges=True)


def _loha_change(source: Source, parts: Parts, scale: float) -> Change:
    """A Hadamard product of two products is one product of all pairs of columns with all pairs of rows."""
    w1_a, w1_b, w2_a, w2_b = (source.values(parts[part]) for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
    rows, rank = w1_a.shape
    columns = w1_b.shape[1]
    if rank * rank >= min(rows, columns):
        return np.asarray((w1_a @ w1_b) * (w2_a @ w2_b) * np.float32(scale), np.float32)
    b = (w1_a[:, :, None] * w2_a[:, None, :]).reshape(rows, rank * rank)
    a = (w1_b[:, None, :] * w2_b[None, :, :]).reshape(rank * rank, columns)
    return Factors(b * np.float32(scale), a)


def lokr(source: Source) -> Plan:
    """ΔW = s·W1 ⊗ W2, either of them perhaps a product itself, with s = alpha/r (Yeh et al. 2024)."""
    scaling = read_scaling(source.config, "alpha")
    changes: dict[str, Callable[[], Change]] = {}
    for module, parts in source.modules(LOKR, "a LoKr").items():
        w1, w2 = (_kronecker_shape(module, parts, name) for name in ("w1", "w2"))
        if (w1[0] * w2[0], w1[1] * w2[1]) != source.base.modules[module]:
            raise refuse("shape_mismatch", f"{module}: {w1} ⊗ {w2} is not {source.base.modules[module]}")
        changes[module] = partial(_lokr_change, source, parts, scaling.scaling_of(module))
    return Plan("lokr", changes, merges=True)


def _kronecker_shape(module: str, parts: Parts, name: str) -> tuple[int, int]:
    if name in parts:
        shape = parts[name].shape
    else:
        require_parts(module, parts, (f"{name}_a", f"{name}_b"))
        left, right = parts[f"{name}_a"].shape, parts[f"{name}_b"].shape
        if len(left) != 2 or len(right) != 2 or left[1] != right[0]:
            raise refuse("shape_mismatch", f"{module}: {name}_a is {left}, {name}_b is {right}, which do not multiply")
        shape = (left[0], right[1])
    if len(shape) != 2:
        raise refuse("shape_mismatch", f"{module}: {name} is {shape}, expected a matrix")
    return shape[0], shape[1]


def _lokr_change(source: Source, parts: Parts, scale: float) -> Factors:
    """(B1·A1) ⊗ (B2·A2) = (B1 ⊗ B2)·(A1 ⊗ A2)."""
    b1, a1 = _as_factors(source, parts, "w1")
    b2, a2 = _as_factors(source, parts, "w2")
    return Factors(np.kron(b1, b2) * np.float32(scale), np.kron(a1, a2))


def _as_factors(source: Source, parts: Parts, name: str) -> tuple[Matrix, Matrix]:
    """The matrix as two of its own rank at most; a whole one as itself and the identity."""
    if name not in parts:
        left, right = source.values(parts[f"{name}_a"]), source.values(parts[f"{name}_b"])
        if left.shape[1] <= min(left.shape[0], right.shape[1]):
            return left, right
        whole = left @ right  # or the Kronecker product of two such would fill any memory
    else:
        whole = source.values(parts[name])
    rows, columns = whole.shape
    return (whole, np.eye(columns, dtype=np.float32)) if columns <= rows else (np.eye(rows, dtype=np.float32), whole)


def vera(source: Source) -> Plan:
    """ΔW = diag(λ_b)·B·diag(λ_d)·A, A and B random and shared by all modules (Kopiczko et al. 2024): a LoRA of their
    rank. Where the file has λ only, A and B would have to be drawn again as torch draws them."""
    shared = {name: source.spans[name] for name in ("base_model.vera_A", "base_model.vera_B") if name in source.spans}
    rest = replace(source, spans={name: span for name, span in source.spans.items() if name not in shared})
    modules = rest.modules(VERA, "a VeRA")
    if len(shared) < 2:
        return Plan("vera", merge_only="its random matrices are not in the file (save_projection=False)")
    a, b = shared["base_model.vera_A"].shape, shared["base_model.vera_B"].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise refuse("rank_mismatch", f"vera_A is {a}, vera_B is {b}")
    changes: dict[str, Callable[[], Change]] = {}
    for module, parts in modules.items():
        require_parts(module, parts, ("lambda_b", "lambda_d"))
        rows, columns = source.base.modules[module]
        require_shapes(module, parts, {"lambda_b": (rows,), "lambda_d": (a[0],)})
        if b[0] < rows or a[1] < columns:
            raise refuse("shape_mismatch", f"{module} is {rows}×{columns}, vera_B·vera_A only {b[0]}×{a[1]}")
        changes[module] = partial(_vera_change, source, shared, parts, module)
    return Plan("vera", changes, merges=True)


def _vera_change(source: Source, shared: Parts, parts: Parts, module: str) -> Factors:
    rows, columns = source.base.modules[module]
    a, b = (source.values(shared[f"base_model.vera_{side}"]) for side in "AB")
    lambda_b, lambda_d = (source.values(parts[f"lambda_{side}"]) for side in "bd")
    return Factors(lambda_b[:, None] * b[:rows], lambda_d[:, None] * a[:, :columns])


def _require_fit(source: Source, module: str, rows: int, columns: int) -> None:
    if (rows, columns) != source.base.modules[module]:
        raise refuse("shape_mismatch", f"{module}: B·A is {rows}×{columns}, in {source.base.name} it is another shape")
