"""What a merge keeps of an adapter, in figures: a frozen record, to JSON and back, and a budget to judge it by.

It knows no model, no terminal and no picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from adapters.merge.bases import Values

Part = Literal["adapter", "merged", "base"]
"""What a variant is made of: base and adapter side by side, both in one, or the base alone."""
BASES: tuple[Values, ...] = get_args(Values)
"""The values that the base has in NF4, and those that it was published with."""

Told = Callable[[str, int, int], None]
"""What is being measured, how much of the whole is done, and how much there is, in tokens and tensors."""


@dataclass(frozen=True)
class Budget:
    """What a merge may differ from the adapter path, in nats per token.

    Rounding the weights to bf16 costs about 0.001, which nobody can tell apart; the wrong base of an adapter trained
    on NF4 costs 0.1 and more. 0.01 is ten times from either, and so is a loss of 0.02, which is 2 % of perplexity.
    """

    max_kl: float = 0.01
    max_loss_increase: float = 0.02


@dataclass(frozen=True)
class Closeness:
    """One set of texts, teacher-forced; all in nats per token but `same_top`."""

    loss: float
    kl: float
    """Mean KL divergence of the reference's next-token distribution to this one's."""
    mean_change: float
    """Of |Δ log-probability| of the tokens that the texts have."""
    largest_change: float
    same_top: float
    """Share of the places at which the likeliest token is the reference's."""


@dataclass(frozen=True)
class VariantReport:
    part: Part
    base: str
    """One of BASES."""
    stored: str
    """How the weights are held: float32, bfloat16, float16, nf4."""
    computed: str
    """The type of its products: bfloat16 only where the processor has instructions for it."""
    task: Closeness
    general: Closeness

    @property
    def name(self) -> str:
        return name_of(self.part, self.base, self.stored)


def name_of(part: str, base: str, stored: str) -> str:
    return f"{part}, {base}, {stored}"


@dataclass(frozen=True)
class Survival:
    """What a format keeps of one change of weights."""

    kept: float
    """⟨W' - B', ΔW⟩ / ‖ΔW‖², with W' and B' the merged weight and the base's in that format: 1 is all of it."""
    error: float
    """‖W' - W‖ / ‖ΔW‖, with W the merged weight before rounding: noise that is beside it, not what is lost of it."""


@dataclass(frozen=True)
class ModuleReport:
    """One tensor that the merge changes, on one of the bases."""

    tensor: str
    base: str
    size: float
    """‖ΔW‖"""
    change: float
    """‖ΔW‖ / ‖W‖; 0 where the base's is 0."""
    formats: Mapping[str, Survival]


@dataclass(frozen=True)
class FormatReport:
    """All of a base's changed tensors together."""

    base: str
    stored: str
    kept: float
    """Of the whole change, see `Survival`."""
    least_kept: float
    """Of the change of any one tensor."""
    noise: float
    """The middle one of the tensors' `Survival.error`."""


@dataclass(frozen=True)
class FidelityReport:
    adapter: str
    base: str
    trained_on: str
    """One of BASES: the reference is the adapter on it, unmerged, in fp32."""
    judged: str
    """The name of the variant that is wanted."""
    probes: str
    """Where the texts of the task come from."""
    task_tokens: int
    general_tokens: int
    variants: tuple[VariantReport, ...]
    """The first is the reference."""
    formats: tuple[FormatReport, ...]
    """All for the base that is wanted, NF4 for the other."""
    modules: tuple[ModuleReport, ...] = ()
    """What `formats` sums up; the largest part of the report by far, and left out where there is little room."""

    @property
    def reference(self) -> VariantReport:
        return self.variants[0]

    def variant(self, part: str, base: str, stored: str) -> VariantReport | None:
        return self.named(name_of(part, base, stored))

    def named(self, name: str) -> VariantReport | None:
        return next((variant for variant in self.variants if variant.name == name), None)

    @property
    def onto(self) -> str:
        """The base of the variant that is wanted."""
        return next(variant.base for variant in self.variants if variant.name == self.judged)

    def format(self, stored: str, base: str | None = None) -> FormatReport | None:
        """Of the wanted base by default; None: not measured."""
        wanted = (base or self.onto, stored)
        return next((each for each in self.formats if (each.base, each.stored) == wanted), None)

    def within(self, budget: Budget, name: str | None = None) -> Judgement:
        """Of the variant that is wanted, or of the one named."""
        wanted = self.named(name or self.judged)
        assert wanted is not None, name or self.judged
        return Judgement(tuple(_reasons(wanted, self.reference, budget)))

    def to_json(self, *, modules: bool = True) -> dict[str, Any]:
        """`from_json` reads it without the modules as well."""
        return asdict(self if modules else replace(self, modules=()))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FidelityReport:
        values = dict(data)
        values["variants"] = tuple(_variant(each) for each in values["variants"])
        values["formats"] = tuple(FormatReport(**each) for each in values["formats"])
        values["modules"] = tuple(_module(each) for each in values["modules"])
        return cls(**values)


@dataclass(frozen=True)
class Judgement:
    reasons: tuple[str, ...]
    """Why it is above the budget; empty where it is not."""

    @property
    def passed(self) -> bool:
        return not self.reasons


def _reasons(found: VariantReport, reference: VariantReport, budget: Budget) -> Sequence[str]:
    sets = (("task", found.task, reference.task), ("general text", found.general, reference.general))
    reasons = []
    for texts, own, theirs in sets:
        increase = own.loss - theirs.loss
        if not math.isfinite(own.kl) or own.kl > budget.max_kl:
            reasons.append(f"KL to the adapter on {texts} is {own.kl:.4f} nats per token, at most {budget.max_kl:g}")
        if not math.isfinite(increase) or increase > budget.max_loss_increase:
            reasons.append(
                f"loss on {texts} rises by {increase:.4f} to {own.loss:.4f} nats per token, "
                f"by at most {budget.max_loss_increase:g}"
            )
    return reasons


def _variant(data: Mapping[str, Any]) -> VariantReport:
    sets = {texts: Closeness(**data[texts]) for texts in ("task", "general")}
    return VariantReport(**{**data, **sets})


def _module(data: Mapping[str, Any]) -> ModuleReport:
    formats = {stored: Survival(**figures) for stored, figures in data["formats"].items()}
    return ModuleReport(**{**data, "formats": formats})
