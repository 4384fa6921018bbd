"""What the routes answer of adapters, versions and moves of aliases, as JSON. Knows no HTTP."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from adapters.registry import About, Adapter, Alias, Move, Overview, Shadow, Version
from adapters.tags import Tags
from adapters.targets import Target, main_version, to_json
from server.engine.merged import MergedEngine
from server.services import Services
from server.status import Moment


def adapter_json(adapter: Adapter, moment: Moment) -> dict[str, Any]:
    return _named(adapter) | {"versions": versions_json(adapter, moment)}


def overview_json(overview: Overview, moment: Moment) -> dict[str, Any]:
    return _named(overview) | {
        "version_count": sum(overview.counts.values()),
        "states": dict(sorted(overview.counts.items())),
        "latest": overview.latest,
        "resident": moment.resident_of(overview.name),
    }


def _named(adapter: Adapter | Overview) -> dict[str, Any]:
    return {
        "object": "adapter",
        "name": adapter.name,
        "description": adapter.description,
        "created_at": int(adapter.created_at.timestamp()),
        "aliases": adapter.aliases,
        "splits": {alias: to_json(target) for alias, target in adapter.splits.items()},
        "shadows": {alias: shadow_json(shadow) for alias, shadow in adapter.shadows.items()},
        "tags": dict(adapter.tags),
    }


def shadow_json(shadow: Shadow | None) -> dict[str, int] | None:
    return None if shadow is None else {"version": shadow.number, "percent": shadow.percent}


def versions_json(adapter: Adapter, moment: Moment) -> list[dict[str, Any]]:
    return [
        version_json(version, adapter.aliases_of(version.number), adapter.tags_of(version.number), moment)
        for version in adapter.versions
    ]


def alias_json(alias: Alias) -> dict[str, Any]:
    return {
        "object": "adapter.alias",
        "name": alias.adapter,
        "alias": alias.name,
        "version": main_version(alias.target) if alias.target else None,
        "split": to_json(alias.target) if len(alias.target) > 1 else None,
        "shadow": shadow_json(alias.shadow),
        "moves": [move_json(move) for move in alias.moves],
    }


def move_json(move: Move) -> dict[str, Any]:
    return {
        "from": _ends(move.old),
        "to": _ends(move.new),
        "how": move.how,
        "by": move.by,
        "at": int(move.at.timestamp()),
        "undone": move.undone,
    }


def _ends(target: Target) -> int | dict[str, int] | None:
    """A number, or a split, or none."""
    return to_json(target) if len(target) > 1 else next(iter(target), None)


async def shown_version(wired: Services, version: Version) -> dict[str, Any]:
    return detail_json(version, await asyncio.to_thread(wired.registry.about, version), moment_of(wired))


def detail_json(version: Version, about: About, moment: Moment) -> dict[str, Any]:
    return version_json(version, about.aliases, about.tags, moment) | {
        "verdict": version.manifest.verdict,
        "probe": version.probe,
        "fidelity": about.fidelity,
        "manifest": version.manifest.to_json(),
        "parents": [{"parent": parent, "href": _href(found)} for parent, found in about.parents.items()],
    }


def _href(ref: str | None) -> str | None:
    if ref is None:
        return None
    name, _, number = ref.partition("@")
    return f"/v1/adapters/{name}/versions/{number}"


def version_json(version: Version, aliases: list[str], tags: Tags, moment: Moment) -> dict[str, Any]:
    return {
        "object": "adapter.version",
        "name": version.adapter,
        "version": version.number,
        "digest": version.digest,
        "state": version.state,
        "reason": version.reason,
        "created_at": int(version.created_at.timestamp()),
        "aliases": aliases,
        "tags": dict(tags),
        **moment.of(version).to_json(),
    }


def engine_json(engine: MergedEngine) -> dict[str, Any]:
    """Of a merged engine. Where its weights lie is nobody's business."""
    return {
        "name": engine.name,
        "adapter": engine.name.partition("@")[0],
        "state": engine.state,
        "reason": engine.pool.reason,
        "leases": engine.leases,
        "waiting": engine.turns.waiting,
        "ready_since": None if engine.since is None else round(engine.since, 3),
        "build_s": None if engine.build_s is None else round(engine.build_s, 2),
        "restarts": engine.pool.restarts,
        "planned_bytes": dict(engine.plan.terms) | {"in all": engine.plan.total},
    }


def file_json(version: Version, path: Path) -> dict[str, Any]:
    return {"name": path.name, "size_bytes": path.stat().st_size, "sha256": version.manifest.files[path.name]}


def moment_of(wired: Services) -> Moment:
    return Moment.now(wired.residency, wired.turns, wired.merged)
