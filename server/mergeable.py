"""Which version a merge or an export means, whether it may be merged, and what is kept of it. Knows no job."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from adapters.errors import NotFound
from adapters.records import MERGE_ONLY, READY
from adapters.registry import Registry, Version
from server.errors import AdapterUnavailable, PermissionDenied
from server.settings import Settings

log = logging.getLogger(__name__)


def require_merging(settings: Settings) -> None:
    if not settings.merging:
        raise PermissionDenied("merging is switched off here (merging)", code="merging_off")


def mergeable(registry: Registry, base_name: str, asked: str) -> Version:
    """The version that `name@ref` means. Raises AdapterUnavailable for one in no state to be merged."""
    version = registry.resolve(*split_ref(asked.removeprefix(base_name + ":")))
    if version.state not in (READY, MERGE_ONLY):
        raise AdapterUnavailable(
            f"adapter {version.ref} is {version.state}" + (f": {version.reason}" if version.reason else ""),
            code=f"adapter_{version.state}",
        )
    return version


def split_ref(asked: str) -> tuple[str, str | None]:
    name, _, ref = asked.partition("@")
    return name, ref or None


def named(version: Version) -> dict[str, str]:
    return {"ref": version.ref, "digest": version.digest}


def keep_report(registry: Registry, ref: str, done: Mapping[str, Any]) -> None:
    try:
        registry.set_merge_report(registry.resolve(*split_ref(ref)), done["fidelity"], done["report"])
    except NotFound:
        log.warning("merged, and gone meanwhile", extra={"adapter": ref})
