"""What only a merged engine can serve, while none answers: what a request for it hears, and what keeps its engine.

A request through an alias hears 503: somebody rolled that version out, and means it to answer. One that names the
version itself hears 409 where nobody is about to build an engine.
"""

from __future__ import annotations

from adapters.errors import Conflict
from adapters.jobs import Job
from adapters.records import MERGE_ONLY
from adapters.references import listed
from adapters.registry import Registry, Version
from server.engine.merged import MergedEngine
from server.errors import AdapterUnavailable, EngineUnavailable, ServerError

GONE = "no_merged_engine"


def why_not(version: Version, alias: str | None, engine: MergedEngine | None, job: Job | None) -> ServerError | None:
    """None while it is in the engine's own hands. `job`: the one that is to give it an engine here."""
    if engine is not None and engine.state not in ("failed", "draining"):
        return None
    through = f", which the alias {alias!r} serves," if alias else ""
    told = f"adapter {version.ref}{through} can be served only merged"
    if engine is not None and engine.state == "failed":
        return _away(f"{told}, and its engine was given up: {engine.pool.reason}; {_how(version)}")
    if job is not None:
        return EngineUnavailable(f"{told}, and its engine is still to be built by {job.id}; try again shortly")
    if engine is not None:
        return _away(f"{told}, and its engine is being taken back; {_how(version)}")
    if alias is not None:
        return _away(f"{told}, and this server has no engine of it; {_how(version)}, or move the alias")
    told += f" ({version.reason})" if version.reason else ""
    return AdapterUnavailable(f"{told}, and has no engine; {_how(version)}", code="adapter_merge_only", param="model")


def require_unaliased(registry: Registry, version: Version) -> None:
    """Conflict where an alias serves what would be served no more without its engine."""
    if version.state == MERGE_ONLY and (pointing := registry.aliases_of(version)):
        raise Conflict(
            f"{version.ref} is merge only, and what the alias {listed(pointing)} serves: without its engine those "
            "requests get 503; move the alias first, or take the engine back all the same with ?force=true",
            code="version_in_use",
        )


def _away(message: str) -> EngineUnavailable:
    return EngineUnavailable(message, code=GONE)


def _how(version: Version) -> str:
    return f"PUT /v1/adapters/{version.adapter}/versions/{version.number}/merged builds one"
