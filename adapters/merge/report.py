"""What a merge keeps of an adapter, in figures: a frozen record, to JSON and back, and a budget to judge it by.

It knows no model, no terminal and no picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from adapters.merge.bases import Values

Part = Literal["adapter", "merged", "base"]
"""What a variant is made of: base and adapter side by side, both in one, or the base alone."""
BASES: tuple[Values, ...] = get_args(Values)
"""The values that the base has in NF4, and those that it was published with."""

Told = Callable[[str, int, int], None]
"""What is being measured, how much of the whole is done, and how much there is, in tokens and tensors."""


MAX_KL, MAX_LOSS_INCREASE = 0.01, 0.02
FOUR_BITS = 1.5
SURE = 2.0
"""Standard errors by which a loss must have risen above its limit: of few tokens a loss is more chance than merge, and
refused good merges, one in five. KL needs no such room: on the same tokens it hardly scatters."""
LEAST_KEPT = 0.5
"""Of the change of the weights, in the format that is wanted: below that the adapter is not in it any more."""


@dataclass(frozen=True)
class Budget:
    """What a merge may differ from the adapter path, in nats per token; None: what is usual for its format.

    Rounding the weights to bf16 costs about 0.001, which nobody can tell apart; the wrong base of an adapter trained
    on NF4 costs 0.1 and more. 0.01 is ten times from either, and so is a loss of 0.02, which is 2 % of perplexity.
    q8_0 costs 0.004, and has the same. What four bits cost depends on the model: a small one loses a fifth of a nat,
    a large one a fiftieth. So in NF4 a merge may differ by what NF4 costs the base itself as well, measured on the
    same texts, and by half as much again, for the merge is another model than the base.
    """

    max_kl: float | None = None
    max_loss_increase: float | None = None


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
    loss_error: float = 0.0
    """Standard error of the loss's difference from the reference's, as if tokens came independently of each other."""


@dataclass(frozen=True)
class Cost:
    """What NF4 costs the base itself, without an adapter, on one set of texts."""

    kl: float
    loss: float


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
    nf4_costs: Mapping[str, Cost] = field(default_factory=dict)
    """Of `task` and `general`; empty where NF4 is not wanted, or the base has no 16-bit values."""
    modules: tuple[ModuleReport, ...] = ()
    """What `formats` sums up; the largest part of the report by far, and left out where there is little room."""
    whole: str = ""
    """Why whole models were in memory; empty: one layer was."""
    asked: str = ""
    """A digest of what was measured and on which texts; empty: nobody will ask for the same again."""

    @property
    def reference(self) -> VariantReport:
        return self.variants[0]

    def variant(self, part: str, base: str, stored: str) -> VariantReport | None:
        return self.named(name_of(part, base, stored))

    def named(self, name: str) -> VariantReport | None:
        return next((variant for variant in self.variants if variant.name == name), None)

    @property
    def wanted(self) -> VariantReport:
        return next(variant for variant in self.variants if variant.name == self.judged)

    @property
    def onto(self) -> str:
        """The base of the variant that is wanted."""
        return self.wanted.base

    def format(self, stored: str, base: str | None = None) -> FormatReport | None:
        """Of the wanted base by default; None: not measured."""
        wanted = (base or self.onto, stored)
        return next((each for each in self.formats if (each.base, each.stored) == wanted), None)

    def within(self, budget: Budget, name: str | None = None) -> Judgement:
        """Of the variant that is wanted, or of the one named."""
        wanted = self.named(name) if name else self.wanted
        assert wanted is not None, name
        return Judgement((*self._too_far(wanted, budget), *self._too_little_kept(wanted)))

    def _too_far(self, found: VariantReport, budget: Budget) -> Iterator[str]:
        for texts, of in (("task", "task"), ("general", "general text")):
            own, theirs = getattr(found, texts), getattr(self.reference, texts)
            cost = self.nf4_costs.get(texts) if found.stored == "nf4" else None
            most, in_words = _limit(budget.max_kl, MAX_KL, cost.kl if cost else None)
            if not own.kl <= most:
                yield f"KL to the adapter on {of} is {own.kl:.4f} nats per token, at most {in_words}"
            increase = own.loss - theirs.loss
            most, in_words = _limit(budget.max_loss_increase, MAX_LOSS_INCREASE, cost.loss if cost else None)
            if not increase - SURE * own.loss_error <= most:
                yield (
                    f"loss on {of} rises by {increase:.4f} ± {own.loss_error:.4f} to {own.loss:.4f} nats per token, by "
                    f"at most {in_words}"
                )

    def _too_little_kept(self, found: VariantReport) -> Iterator[str]:
        of_it = self.format(found.stored, found.base)
        if of_it is not None and not of_it.kept >= LEAST_KEPT:
            yield f"{of_it.kept:.1%} of the adapter's change of the weights is left, at least {LEAST_KEPT:.0%}"

    def to_json(self, *, modules: bool = True) -> dict[str, Any]:
        """`from_json` reads it without the modules as well."""
        return asdict(self if modules else replace(self, modules=()))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FidelityReport:
        values = dict(data)
        values["variants"] = tuple(_variant(each) for each in values["variants"])
        values["formats"] = tuple(FormatReport(**each) for each in values["formats"])
        values["nf4_costs"] = {texts: Cost(**each) for texts, each in values.get("nf4_costs", {}).items()}
        values["modules"] = tuple(_module(each) for each in values["modules"])
        return cls(**values)


@dataclass(frozen=True)
class Judgement:
    reasons: tuple[str, ...]
    """Why it is above the budget; empty where it is not."""

    @property
    def passed(self) -> bool:
        return not self.reasons


def _limit(asked: float | None, usual: float, four_bits: float | None) -> tuple[float, str]:
    """And in words."""
    most = usual if asked is None else asked
    if asked is not None or four_bits is None:
        return most, f"{most:g}"
    most += FOUR_BITS * max(four_bits, 0.0)
    return most, f"{most:.4f} ({usual:g}, and {FOUR_BITS:g} times the {four_bits:.4f} that NF4 costs the base itself)"


def _variant(data: Mapping[str, Any]) -> VariantReport:
    sets = {texts: Closeness(**data[texts]) for texts in ("task", "general")}
    return VariantReport(**{**data, **sets})


def _module(data: Mapping[str, Any]) -> ModuleReport:
    formats = {stored: Survival(**figures) for stored, figures in data["formats"].items()}
    return ModuleReport(**{**data, "formats": formats})
