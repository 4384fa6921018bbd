"""Answers against the answers that were expected: exact match, and for JSON its validity and every field of it.

Pure: it knows no model and no server. Comparing is strict on purpose: `"1"` is not `1`, and order of keys is not looked
at, because no program that reads JSON does. Valid is what a parser takes as it stands; what is in it counts also where
chat models like to put it, in a code fence with or without words around it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FENCED = re.compile(r"^\s*```\w*\n(.*?)^\s*```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Score:
    rows: int
    exact: float
    """Share of answers that equal the expected one, without white space around it."""
    valid_json: float | None = None
    """Share of answers that are JSON and nothing else; None where no expected answer is a JSON object."""
    json_match: float | None = None
    """Share of answers whose JSON is the same value, also where it stands in a code fence."""
    fields: Mapping[str, float] | None = None
    """Key of the expected objects → share of them in which the answer has the same value there."""
    loss: float | None = None
    """Mean cross-entropy of the expected answers, in nats a token; None where only text is seen."""


def score(expected: Sequence[str], answers: Sequence[str], loss: float | None = None) -> Score:
    count = len(expected)
    exact = sum(want.strip() == got.strip() for want, got in zip(expected, answers, strict=True)) / count
    wanted = [parsed(text) for text in expected]
    if not all(isinstance(value, dict) for value in wanted):
        return Score(count, exact, loss=loss)
    found = [contained(text) for text in answers]
    return Score(
        rows=count,
        exact=exact,
        valid_json=sum(parsed(text) is not INVALID for text in answers) / count,
        json_match=sum(same(want, got) for want, got in zip(wanted, found, strict=True)) / count,
        fields=_fields(wanted, found),
        loss=loss,
    )


class _Invalid:
    pass


INVALID = _Invalid()


def parsed(text: str) -> Any:
    """The JSON value, or INVALID. NaN and its like are no JSON."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return INVALID


def contained(text: str) -> Any:
    """The JSON value that an answer is, or that its only code fence holds; else INVALID."""
    fenced = FENCED.findall(text)
    return parsed(fenced[0]) if len(fenced) == 1 else parsed(text)


def same(want: Any, got: Any) -> bool:
    """As JSON: true is not 1."""
    if got is INVALID:
        return False
    return json.dumps(want, sort_keys=True) == json.dumps(got, sort_keys=True)


def _fields(wanted: Sequence[dict[str, Any]], found: Sequence[Any]) -> dict[str, float]:
    keys = dict.fromkeys(key for want in wanted for key in want)
    right = dict.fromkeys(keys, 0)
    there = dict.fromkeys(keys, 0)
    for want, got in zip(wanted, found, strict=True):
        for key, value in want.items():
            there[key] += 1
            right[key] += isinstance(got, dict) and key in got and same(value, got[key])
    return {key: right[key] / there[key] for key in keys}


def _refuse(constant: str) -> None:
    raise ValueError(constant)
