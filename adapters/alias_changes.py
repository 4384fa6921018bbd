"""Changes of aliases, inside a transaction that holds the adapter's row: move, roll back, remove, shadow.

An alias moves only to versions that can be asked, and every move is on record. Knows no database of its own.
"""

from __future__ import annotations

from sqlalchemy import Connection

from adapters import names, rows, shadow_rows
from adapters.errors import Conflict
from adapters.holds import last_move
from adapters.records import MERGE_ONLY, READY, Adapter, Shadow
from adapters.references import listed, unknown_ref
from adapters.servable import Answers, is_servable, without_engine
from adapters.targets import Target


def move(connection: Connection, name: str, alias: str, target: Target, by: str | None, answers: Answers) -> None:
    for number in target:
        version = rows.require_version(connection, name, number)
        if not is_servable(version, answers):
            if version.state == MERGE_ONLY:
                raise without_engine(version, "move the alias")
            raise Conflict(f"{version.ref} is {version.state}; an alias can only move to a ready version")
    rows.move(connection, name, alias, target, "set", by=by)


def roll_back(connection: Connection, name: str, alias: str, by: str | None, answers: Answers) -> None:
    adapter = rows.read_adapter(connection, name)
    if alias not in adapter.targets:
        raise unknown_ref(adapter, alias)
    number, last = last_move(rows.read_moves(connection, name, alias)) or (0, None)
    if last is None or not last.old:
        raise Conflict(
            f"alias {alias!r} of {name} has no earlier target on record; move it with PUT instead",
            code="nothing_to_roll_back",
        )
    for each in last.old:
        _require_servable(adapter, alias, each, answers)
    rows.move(connection, name, alias, last.old, "rollback", by=by)
    rows.mark_undone(connection, number)


def remove(connection: Connection, name: str, alias: str, by: str | None) -> None:
    if alias == names.DEFAULT:
        raise Conflict(f"alias {alias!r} is what {name!r} alone means; move it to another version instead")
    if alias not in rows.read_targets(connection, name):
        raise unknown_ref(rows.read_adapter(connection, name), alias)
    rows.move(connection, name, alias, {}, "remove", by=by)


def set_shadow(connection: Connection, name: str, alias: str, shadow: Shadow | None) -> None:
    """None: it has none any more."""
    target = rows.read_targets(connection, name).get(alias)
    if target is None:
        raise unknown_ref(rows.read_adapter(connection, name), alias)
    if shadow is not None:
        version = rows.require_version(connection, name, shadow.number)
        if version.state != READY:  # also where it has an engine: a shadow is asked by LoRA, behind everybody else
            raise Conflict(f"{version.ref} is {version.state}; only a ready version can be a shadow")
        if set(target) == {shadow.number}:
            raise Conflict(
                f"alias {alias!r} of {name} points to version {shadow.number} itself; shadow it with another version"
            )
    shadow_rows.write_shadow(connection, name, alias, shadow)


def _require_servable(adapter: Adapter, alias: str, number: int, answers: Answers) -> None:
    versions = {version.number: version for version in adapter.versions}
    before = versions.get(number)
    if before is not None and is_servable(before, answers):
        return
    if before is not None and before.state == MERGE_ONLY:
        raise without_engine(before, f"roll back the alias {alias!r}, which pointed to it before its last move")
    ready = [str(version.number) for version in adapter.versions if version.state == READY]
    raise Conflict(
        f"before its last move alias {alias!r} of {adapter.name} pointed to version {number}, which is "
        f"{before.state if before else 'deleted'}; move it with PUT to one that is ready: {listed(ready)}",
        code="rollback_target_gone",
    )
