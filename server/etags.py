"""ETags of what the registry answers: unchanged answers cost a client no bytes, changes can say what they saw.

    "7-3f2a…"      revision of the adapter in the registry, then a digest of the answer's bytes
    "3f2a…"        a list: the digest alone

`If-None-Match` compares the whole, because leases and residency are part of an answer. `If-Match` compares the revision
alone: what the engine loads or evicts meanwhile is no change of the adapter. Knows no framework.
"""

from __future__ import annotations

import hashlib
import re

TAG = re.compile(r'(W/)?"([^"]*)"')
REVISION = re.compile(r"([0-9]{1,18})(-[0-9a-f]*)?")


def etag_of(content: bytes, revision: int | None = None) -> str:
    digest = hashlib.sha256(content).hexdigest()[:32]
    return f'"{digest}"' if revision is None else f'"{revision}-{digest}"'


def is_unchanged(if_none_match: str | None, etag: str) -> bool:
    """Whether the client has this answer already."""
    if if_none_match is None:
        return False
    return if_none_match.strip() == "*" or etag.strip('"') in [value for _, value in TAG.findall(if_none_match)]


def expected_revisions(if_match: str | None) -> frozenset[int] | None:
    """Those at which the change may happen; None: at any. A weak tag or a stranger's stands for no revision."""
    if if_match is None or if_match.strip() == "*":
        return None
    found = [REVISION.fullmatch(value) for weak, value in TAG.findall(if_match) if not weak]
    return frozenset(int(match[1]) for match in found if match)
