"""Which versions can be asked: those that are ready; and those that are merge only, while an engine of theirs answers.

Whether one does is the server's knowledge, and that of each server alone: it is asked for every time.
"""

from __future__ import annotations

from collections.abc import Callable

from adapters.errors import Conflict
from adapters.records import MERGE_ONLY, READY, Version

Answers = Callable[[Version], bool]
"""Whether this version has a merged engine that answers now."""


def nobody(_: Version) -> bool:
    """Where no server is."""
    return False


def is_servable(version: Version, answers: Answers) -> bool:
    return version.state == READY or (version.state == MERGE_ONLY and answers(version))


def without_engine(version: Version, then: str) -> Conflict:
    """`then`: what can be done when it has one."""
    return Conflict(
        f"{version.ref} is merge only, and no merged engine of it is ready here; have one built first "
        f"(PUT /v1/adapters/{version.adapter}/versions/{version.number}/merged), then {then}",
        code="needs_merged_engine",
    )
