"""Which version deserves an engine of merged weights: one look at a situation → what should change, and why. Pure.

    asked by many, steadily → promote          asked by few, steadily, after its minimum life → demote
    much more asked than the least asked of those promoted, and no place is free → that one is demoted first

One change at a time; never more than the limit; what was promoted by hand stays. A version that failed, or was rolled
back, rests for a while that doubles each time. The gain is predicted only from what was measured. What a look must
remember for the next one is its `Memory`; the clock is the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from server.traffic import Asked

Action = Literal["promote", "demote", "keep", "wait"]
Source = Literal["measured", "proxy"]


@dataclass(frozen=True)
class Rules:
    rise_share: float
    """Share of all tokens from which a version deserves an engine."""
    tokens_per_minute: float
    """And so many at least."""
    rise_s: float
    """For so long."""
    fall_s: float
    """How long it must be asked by few before it loses the engine."""
    min_life_s: float
    """How long an engine stays at least."""
    cool_down_s: float
    """How long a version rests after the first failure."""
    most: int
    """Engines of merged weights, those by hand included."""
    fall: float = 0.5
    """Few: less than this part of what it must rise to."""
    worth: float = 2.0
    """How many times the tokens of another a version must have to take its place: a rebuild is not free."""
    least_speedup: float = 1.05
    """What was measured as less is not worth an engine."""
    longest_rest_s: float = 86_400.0

    def rest_s(self, failures: int) -> float:
        return 0.0 if failures < 1 else min(self.cool_down_s * 2.0 ** min(failures - 1, 30), self.longest_rest_s)


@dataclass(frozen=True)
class Standing:
    """A version that has an engine, or is about to."""

    since: float
    """When requests first went there; while it is built, when that began."""
    is_changing: bool = False
    """It is being built, or measured before it is kept."""
    by_hand: bool = False


@dataclass(frozen=True)
class Past:
    """How the last attempts with a version ended."""

    failures: int
    """In a row."""
    ended_at: float


@dataclass(frozen=True)
class Prediction:
    """What a merged engine would gain, from speeds measured on this server: seconds from one token to the next."""

    lora_tpot_s: float | None = None
    """Of this version, now."""
    other_tpot_s: float | None = None
    """Of a merged engine, or of the base for want of one."""
    source: Source = "measured"
    """Whether `other_tpot_s` is of a merged engine. The base is a proxy: it computes in another format."""

    @property
    def speedup(self) -> float | None:
        if self.lora_tpot_s is None or not self.other_tpot_s:
            return None
        return self.lora_tpot_s / self.other_tpot_s

    def __str__(self) -> str:
        if self.lora_tpot_s is None:
            return "its gain cannot be predicted: how fast its LoRA path is was not measured yet"
        if self.speedup is None or self.other_tpot_s is None:
            return "its gain cannot be predicted: no merged engine was measured yet"
        whose = "a merged engine here" if self.source == "measured" else "the base, as a proxy for a merged engine"
        times = f"{1e3 * self.lora_tpot_s:.1f} ms a token by LoRA, {1e3 * self.other_tpot_s:.1f} ms by {whose}"
        return f"predicted {self.speedup:.2f} times as fast ({times})"


@dataclass(frozen=True)
class Situation:
    """Versions by `name@number`."""

    now: float
    asked: Mapping[str, Asked]
    standing: Mapping[str, Standing] = field(default_factory=dict)
    past: Mapping[str, Past] = field(default_factory=dict)
    predictions: Mapping[str, Prediction] = field(default_factory=dict)
    no_room: str | None = None
    """Why one more engine does not fit into the memory now; None: it does."""


@dataclass(frozen=True)
class Memory:
    """Since when each version has been asked by many, and by few."""

    many_since: Mapping[str, float] = field(default_factory=dict)
    few_since: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    action: Action
    ref: str
    reason: str
    """One sentence, with figures."""
    figures: Mapping[str, Any] = field(default_factory=dict)


def decide(situation: Situation, memory: Memory, rules: Rules) -> tuple[list[Decision], Memory]:
    """A decision for each version that has an engine, then for each that is asked by many. At most one is a change."""
    memory = _remember(situation, memory, rules)
    return _one_change(_Look(situation, memory, rules).decisions()), memory


def _remember(situation: Situation, before: Memory, rules: Rules) -> Memory:
    now, asked = situation.now, situation.asked
    many = {ref for ref, each in asked.items() if _is_many(each, rules)}
    few = {ref for ref in situation.standing if _share(asked.get(ref)) < rules.fall * rules.rise_share}
    return Memory(
        {ref: before.many_since.get(ref, now) for ref in sorted(many)},
        {ref: before.few_since.get(ref, now) for ref in sorted(few)},
    )


def _one_change(decisions: Iterator[Decision]) -> list[Decision]:
    """What comes after the first change waits for the next look."""
    found: list[Decision] = []
    changing: str | None = None
    for each in decisions:
        if each.action in ("promote", "demote"):
            if changing is not None:
                reason = f"{each.ref} waits: one change at a time, and {changing} is changed first"
                each = Decision("wait" if each.action == "promote" else "keep", each.ref, reason, each.figures)
            else:
                changing = each.ref
        found.append(each)
    return found


class _Look:
    def __init__(self, situation: Situation, memory: Memory, rules: Rules) -> None:
        self._now = situation.now
        self._situation = situation
        self._memory = memory
        self._rules = rules
        standing = situation.standing
        self._changing = next((ref for ref, each in sorted(standing.items()) if _blocks(each)), None)
        candidates = [ref for ref in memory.many_since if ref not in standing]
        self._candidates = sorted(candidates, key=lambda ref: (-self._tokens(ref), ref))

    def decisions(self) -> Iterator[Decision]:
        for ref, each in sorted(self._situation.standing.items()):
            yield self._of_standing(ref, each)
        for ref in self._candidates:
            yield self._of_candidate(ref)

    def _of_standing(self, ref: str, standing: Standing) -> Decision:
        """It stays, unless few have asked for it for long, or somebody is much more asked and has no place."""
        told, life = self._told(ref), self._now - standing.since
        if standing.is_changing:
            return self._is("keep", ref, f"{ref} is being built, measured or ended; {told}")
        if standing.by_hand:
            return self._is("keep", ref, f"{ref} was promoted by hand and stays until that is taken back; {told}")
        if life < self._rules.min_life_s:
            lived = f"has had its engine for {life:.0f} of at least {self._rules.min_life_s:.0f} s"
            return self._is("keep", ref, f"{ref} {lived}; {told}")
        if self._changing is not None:
            return self._is("keep", ref, f"{ref} stays while {self._changing} is changed; {told}")
        if (few_s := self._lasts(self._memory.few_since, ref)) is not None and few_s >= self._rules.fall_s:
            low = f"less than {self._rules.fall * self._rules.rise_share:.1%}"
            return self._is("demote", ref, f"{told}, {low} for {few_s:.0f} s, after {life:.0f} s with its engine")
        if ref == self._weakest() and (newcomer := self._newcomer(ref)) is not None:
            return self._is("demote", ref, f"{ref} makes room: {self._told(newcomer)}, and {told}")
        return self._is(
            "keep",
            ref,
            f"{told}; it stays above {self._rules.fall * self._rules.rise_share:.1%}, or "
            f"has been below for less than {self._rules.fall_s:.0f} s",
        )

    def _of_candidate(self, ref: str) -> Decision:
        told = self._told(ref)
        if (why_not := self._why_not(ref)) is not None:
            return self._is("wait", ref, f"{told}, but {why_not}")
        if self._changing is not None:
            return self._is("wait", ref, f"{told}, but one change at a time: {self._changing} is being changed")
        if len(self._situation.standing) >= self._rules.most:
            return self._is("wait", ref, f"{told}, but {self._no_place()}")
        if self._situation.no_room is not None:
            return self._is("wait", ref, f"{told}, but {self._situation.no_room}")
        many_s = self._lasts(self._memory.many_since, ref) or 0.0
        reason = (
            f"{told} for {many_s:.0f} s, at least {self._rules.rise_share:.1%} is asked for; {self._prediction(ref)}"
        )
        return self._is("promote", ref, reason)

    def _why_not(self, ref: str) -> str | None:
        """What speaks against this version, whoever else there is."""
        rules = self._rules
        many_s = self._lasts(self._memory.many_since, ref) or 0.0
        if many_s < rules.rise_s:
            return f"only for {many_s:.0f} of {rules.rise_s:.0f} s"
        if (past := self._situation.past.get(ref)) is not None:
            rests_s = past.ended_at + rules.rest_s(past.failures) - self._now
            if rests_s > 0:
                return f"it rests for {rests_s:.0f} s more, after {past.failures} failed attempts in a row"
        prediction = self._prediction(ref)
        speedup = prediction.speedup
        if speedup is not None and prediction.source == "measured" and speedup < rules.least_speedup:
            return f"it is {prediction}, less than {rules.least_speedup:g}"
        return None

    def _newcomer(self, weakest: str) -> str | None:
        """Who deserves the place of the least asked, if anybody does, and no place is free."""
        if len(self._situation.standing) < self._rules.most:
            return None
        enough = self._rules.worth * self._tokens(weakest)
        deserving = (ref for ref in self._candidates if self._tokens(ref) >= enough and self._why_not(ref) is None)
        return next(deserving, None)

    def _weakest(self) -> str | None:
        """The least asked that may go."""
        rules, standing = self._rules, self._situation.standing
        may_go = [
            ref
            for ref, each in standing.items()
            if not each.by_hand and not each.is_changing and self._now - each.since >= rules.min_life_s
        ]
        return min(may_go, key=lambda ref: (self._tokens(ref), ref), default=None)

    def _no_place(self) -> str:
        if self._rules.most == 0:
            return "there may be no merged engines (max_merged_engines is 0)"
        weakest = self._weakest()
        if weakest is None:
            return f"all {self._rules.most} places are taken, and none of those there may go yet"
        return (
            f"{weakest} has {self._tokens(weakest):.0f} a minute: not worth a rebuild below {self._rules.worth:g} times"
        )

    def _prediction(self, ref: str) -> Prediction:
        return self._situation.predictions.get(ref, Prediction())

    def _lasts(self, since: Mapping[str, float], ref: str) -> float | None:
        return self._now - since[ref] if ref in since else None

    def _tokens(self, ref: str) -> float:
        asked = self._situation.asked.get(ref)
        return 0.0 if asked is None else asked.tokens_per_minute

    def _told(self, ref: str) -> str:
        share = _share(self._situation.asked.get(ref))
        return f"{ref} has {share:.1%} of the tokens, {self._tokens(ref):.0f} a minute"

    def _is(self, action: Action, ref: str, reason: str) -> Decision:
        prediction = self._prediction(ref)
        figures = {
            "share": round(_share(self._situation.asked.get(ref)), 4),
            "tokens_per_minute": round(self._tokens(ref), 1),
            "predicted_speedup": None if prediction.speedup is None else round(prediction.speedup, 3),
            "prediction": {name: _rounded(value) for name, value in asdict(prediction).items()},
        }
        return Decision(action, ref, reason, figures)


def _blocks(standing: Standing) -> bool:
    return standing.is_changing and not standing.by_hand


def _is_many(asked: Asked, rules: Rules) -> bool:
    return asked.share >= rules.rise_share and asked.tokens_per_minute >= rules.tokens_per_minute


def _share(asked: Asked | None) -> float:
    return 0.0 if asked is None else asked.share


def _rounded(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value
