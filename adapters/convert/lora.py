"""What stands in a LoRA's file beside plain pairs, and how the whole becomes plain: DoRA, initialisations that changed
the base, trained biases and whole modules, ranks above the limit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from adapters.base import WEIGHT
from adapters.convert.change import Change, Factors
from adapters.convert.initial import INITIALS, FromFile, Initial
from adapters.convert.plan import Plan
from adapters.convert.source import Source, require_shapes
from adapters.lora_weights import not_a_lora_tensor, require_lora_module
from adapters.peft_config import Scaling, modified_base, read_scaling, require_known, require_types
from adapters.refusals import refuse
from adapters.safetensors_header import TensorSpan
from adapters.tensor_values import READABLE, Matrix
from adapters.upload import INITIAL

PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_B\.bias|lora_magnitude_vector)(?:\.weight)?")
A, B, BIAS, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"
UNCHANGED = 1e-6
"""Of a DoRA whose magnitudes are the norms themselves, relative."""


@dataclass(frozen=True)
class Tensors:
    """The file, sorted."""

    pairs: dict[str, dict[str, TensorSpan]] = field(default_factory=dict)
    """Module → its parts."""
    whole: dict[str, TensorSpan] = field(default_factory=dict)
    """Tensors of the base itself, trained or only saved along: biases, modules_to_save. By the base's name."""


@dataclass(frozen=True)
class Trained:
    """All that a LoRA's file changes, compared with its configuration and the base."""

    kind: str
    changes: Mapping[str, Callable[[], Change]]
    """Module → its ΔW."""
    biases: Mapping[str, Callable[[], Matrix]]
    """Module → what is added to what comes out of it."""
    whole: Mapping[str, TensorSpan]
    """The base's tensor → what stands in its place."""


def lora(source: Source, max_rank: int) -> Plan | None:
    """None where it is plain already, and for what `validate` has to refuse."""
    config = source.config
    require_known(config)
    require_types(config)
    init, dora = modified_base(config), bool(config.get("use_dora"))
    scaling = read_scaling(config, "lora_alpha")
    tensors = _sort(source)
    special = dora or tensors.whole or config.get("lora_bias") or config.get("modules_to_save")
    if not (special or init or config.get("bias", "none") != "none" or scaling.largest_rank > max_rank):
        return None
    kind = _require_sound(source, tensors, scaling)
    if (reason := _beyond_lora(source, tensors, dora)) is not None:
        return Plan(kind, merge_only=reason)
    if not tensors.pairs:
        raise refuse("no_modules", f"{source.weights.name} has only tensors that are the base's own, unchanged")
    initial = _initial(source, init, tensors.pairs) if init else None
    return Plan(kind, dict(_changes(source, tensors, scaling, dora, initial)), merges=dora)


def trained(source: Source) -> Trained:
    """Also what no LoRA can stand for: a merge has a place for it."""
    config = source.config
    require_known(config)
    require_types(config)
    init, dora = modified_base(config), bool(config.get("use_dora"))
    scaling, tensors = read_scaling(config, "lora_alpha"), _sort(source)
    kind = _require_sound(source, tensors, scaling)
    initial = _initial(source, init, tensors.pairs) if init else None
    changes = dict(_changes(source, tensors, scaling, dora, initial))
    biases = {
        module: partial(_bias, source, parts[BIAS], scaling.scaling_of(module))
        for module, parts in tensors.pairs.items()
        if BIAS in parts
    }
    return Trained(kind, changes, biases, tensors.whole)


def _require_sound(source: Source, tensors: Tensors, scaling: Scaling) -> str:
    """What it is called."""
    init, dora = modified_base(source.config), bool(source.config.get("use_dora"))
    for module, parts in tensors.pairs.items():
        _require_pair(source, module, parts, scaling, dora)
    if not tensors.pairs and not tensors.whole:
        raise refuse("no_modules", f"{source.weights.name} has no tensor for any module of {source.base.name}")
    if dora and init:
        raise refuse("unsupported_variant", f"use_dora with init_lora_weights {init[:80]!r}")
    return "dora" if dora else init.partition("_")[0] if init else "lora"


def _bias(source: Source, span: TensorSpan, scale: float) -> Matrix:
    return np.asarray(source.values(span) * np.float32(scale), np.float32)


def _sort(source: Source) -> Tensors:
    tensors = Tensors()
    parts = {name: PART.fullmatch(name) for name in source.spans}
    for name, match in parts.items():
        if match is not None:
            require_lora_module(match["module"], source.base)
            tensors.pairs.setdefault(match["module"], {})[match["part"]] = source.spans[name]
    found: dict[str, str] = {}
    for name, match in parts.items():
        if match is None:
            own = _name_in_base(name, source)
            if (other := found.setdefault(own, name)) != name:
                raise refuse("unsupported_tensor", f"{other[:200]!r} and {name[:200]!r} are both to be {own}")
            tensors.whole[own] = source.spans[name]
    return tensors


def _name_in_base(name: str, source: Source) -> str:
    """PEFT has the trained copy stand beside the base's own."""
    plain = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".").replace(".original_module.", ".")
    if plain.removesuffix(WEIGHT) in source.base.modules:
        return plain  # where a merge counts the head among them, it need not be a tensor of its own
    if plain == "lm_head.weight" and plain not in source.base_weights.spans and source.base_weights.ties_embeddings:
        raise refuse("modules_to_save", f"{name!r} is the head, which in {source.base.name} is the embedding itself")
    if plain not in source.base_weights.spans:
        raise not_a_lora_tensor(name)
    return plain


def _require_pair(source: Source, module: str, parts: Mapping[str, TensorSpan], scaling: Scaling, dora: bool) -> None:
    if A not in parts or B not in parts:
        raise refuse("unpaired", f"{module} lacks {A if A not in parts else B}")
    rows, columns = source.base.modules[module]
    (a, b), rank = (parts[side].shape for side in (A, B)), scaling.rank_of(module)
    if len(a) != 2 or len(b) != 2 or (b[0], a[1]) != (rows, columns):
        raise refuse("shape_mismatch", f"{module}: A is {a}, B is {b}; in {source.base.name} it is {rows}×{columns}")
    if not a[0] == b[1] == rank:
        raise refuse("rank_mismatch", f"{module}: A has rank {a[0]}, B has {b[1]}, the configuration says {rank}")
    vectors = {name: (rows,) for name in (BIAS, MAGNITUDE) if name in parts}
    require_shapes(module, parts, vectors)
    if (MAGNITUDE in parts) != dora:
        raise refuse("dora", f"{module} has {'a' if MAGNITUDE in parts else 'no'} magnitude, but use_dora is {dora}")


def _beyond_lora(source: Source, tensors: Tensors, dora: bool) -> str | None:
    """Why a merge can serve it and no LoRA; None where all that is more than a LoRA changes nothing."""
    biased = [m for m, parts in tensors.pairs.items() if BIAS in parts and source.values(parts[BIAS]).any()]
    if biased:
        return f"lora_B of {len(biased)} modules has a trained bias, a constant that no B·A adds, such as {biased[0]}"
    changed = [name for name, span in tensors.whole.items() if is_changed(source, name, span)]
    if changed:
        return f"it changes {len(changed)} tensors of the base as a whole, such as {changed[0]}"
    packed = [module for module in tensors.pairs if dora and not source.weights_beneath.is_plain(module + WEIGHT)]
    if packed:
        return f"what DoRA changes depends on the base's weights, which are packed, such as {packed[0]}"
    return None


def is_changed(source: Source, name: str, span: TensorSpan) -> bool:
    """Whether it is more than a copy of the base's own tensor. Raises InvalidAdapter where the shapes differ."""
    own = source.base_weights.spans[name][1]
    if span.shape != own.shape:
        raise refuse("shape_mismatch", f"{name} is {span.shape}, in {source.base.name} it is {own.shape}")
    parts = source.parts(span)
    if not source.base_weights.is_plain(name):
        return True
    pairs = zip(parts, source.base_weights.parts(name), strict=True)
    return any(not np.array_equal(_as_saved(a, own.dtype), _as_saved(b, span.dtype)) for a, b in pairs)


def _as_saved(values: np.typing.NDArray[np.float32], dtype: str) -> np.typing.NDArray[np.float32]:
    """Rounded to the other's type: a copy that was saved in half precision is unchanged all the same."""
    if dtype == "F16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        bits = values.view("<u4")
        return np.asarray((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000, "<u4").view(np.float32)
    assert dtype in READABLE
    return values


def _initial(source: Source, init: str, modules: Collection[str]) -> Initial:
    """What training began with, and what was taken from the base for it."""
    beside = source.weights.with_name(INITIAL)
    if beside.is_file():
        return FromFile(source.beside(beside))
    if init not in INITIALS:
        raise refuse("modified_base", f"init_lora_weights is {init[:80]!r} and there is no {INITIAL}")
    if not all(source.base_weights.is_plain(module + WEIGHT) for module in modules):
        raise refuse("modified_base", f"init_lora_weights is {init!r}, and the base's weights are packed")
    return INITIALS[init]


def _changes(
    source: Source, tensors: Tensors, scaling: Scaling, dora: bool, initial: Initial | None
) -> Iterator[tuple[str, Callable[[], Change]]]:
    for module, parts in tensors.pairs.items():
        plain = partial(_plain, source, parts, scaling.scaling_of(module))
        if dora:
            yield module, partial(_dora, source, module, parts, plain)
        elif initial is not None:
            yield module, partial(_since, source, module, plain, initial, scaling)
        else:
            yield module, plain


def _plain(source: Source, parts: Mapping[str, TensorSpan], scale: float) -> Factors:
    return Factors(source.values(parts[B]) * np.float32(scale), source.values(parts[A]))


def _dora(source: Source, module: str, parts: Mapping[str, TensorSpan], plain: Callable[[], Factors]) -> Change:
    """ΔW = m/‖W + s·B·A‖ · (W + s·B·A) - W, norms of rows (Liu et al. 2024)."""
    weight, factors = source.weights_beneath.weight(module), plain()
    moved = weight + factors.b @ factors.a
    norms = np.linalg.norm(moved, axis=1)
    if not norms.all():
        raise refuse("non_finite", f"{module}: a row of W + B·A is zero, which DoRA divides by")
    gain = source.values(parts[MAGNITUDE]) / norms
    if np.abs(gain - 1).max() <= UNCHANGED:
        return factors
    return np.asarray(gain[:, None] * moved - weight, np.float32)


def _since(source: Source, module: str, plain: Callable[[], Factors], initial: Initial, scaling: Scaling) -> Factors:
    """ΔW = s·B·A - s·B₀·A₀: the base lost at the start what the untrained adapter added."""
    now, then = plain(), initial.factors(source, module, scaling)
    return Factors(np.hstack([now.b, -then.b]), np.vstack([now.a, then.a]))
