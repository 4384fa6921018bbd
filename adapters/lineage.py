"""Where a version comes from, as its uploader says it: parents, data, run, seed, code. Checked and bounded.

What the files themselves record (loraplex.json) stands; the uploader adds what they leave out. Knows no database.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from adapters.errors import InvalidAdapter
from adapters.json_bounds import require_bounded
from adapters.refusals import refuse

Lineage = Mapping[str, Any]

LOCAL = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,127})@([0-9]{1,9})")
"""A version of this registry, by name and number."""
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
"""A version of this registry or of any other."""
MOST_PARENTS = 64
MOST_BYTES = 16_384
TEXTS = ("data_digest", "run", "code_version")


def require_lineage(lineage: Lineage) -> None:
    """Raises InvalidAdapter. Keys that are not known here may hold any JSON."""
    try:
        raw = json.dumps(lineage, ensure_ascii=False, allow_nan=False).encode()
        require_bounded(raw, MOST_BYTES)
    except (ValueError, RecursionError) as error:  # half a surrogate pair, not a number, too deep
        raise _bad(f"it cannot be written as JSON: {error}") from None
    if len(raw) > MOST_BYTES:
        raise _bad(f"it takes {len(raw)} bytes as JSON, at most {MOST_BYTES} are kept")
    for key in TEXTS:
        if not isinstance(lineage.get(key, ""), str):
            raise _bad(f"{key} is a {type(lineage[key]).__name__}, expected a string")
    if type(lineage.get("seed", 0)) is not int:
        raise _bad(f"seed is a {type(lineage['seed']).__name__}, expected a whole number")
    given = lineage.get("parents", [])
    if given != parents(lineage):
        raise _bad(f"parents is {str(given)[:200]}, expected a list of at most {MOST_PARENTS} name@number or sha256:…")


def parents(lineage: Lineage) -> list[str]:
    """Those that are spelled as parents; a file may record anything."""
    given = lineage.get("parents", [])
    listed = given if isinstance(given, list) else []
    return [each for each in listed if isinstance(each, str) and (LOCAL.fullmatch(each) or DIGEST.fullmatch(each))][
        :MOST_PARENTS
    ]


def merged(recorded: Lineage, given: Lineage) -> dict[str, Any]:
    """Raises InvalidAdapter where the two contradict each other."""
    for key in recorded.keys() & given.keys():
        if recorded[key] != given[key]:
            raise _bad(f"{key} is {str(given[key])[:120]}, recorded is {str(recorded[key])[:120]}; leave it out")
    return {**recorded, **given}


def unknown_parent(parent: str) -> InvalidAdapter:
    return _bad(f"the parent {parent} is no version of this registry; name one that is, or another registry's digest")


def _bad(what: str) -> InvalidAdapter:
    return refuse("bad_lineage", f"the lineage: {what}")
