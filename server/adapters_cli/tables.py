"""What people read: one adapter, version or move in words. Knows the answers of the API, nothing that asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adapters.verify import LOST

SHOWN = 20
LINEAGE = ("parents", "data_digest", "run", "seed", "code_version")
"""Of what is recorded of a version's origin, what fits on a line."""
SIZE_UNITS = ("B", "kB", "MB", "GB")


def print_version(version: dict[str, Any], console: Console) -> None:
    manifest = version["manifest"]
    facts = {
        "status": version["status"] + (f": {version['reason']}" if version["reason"] else ""),
        "aliases": ", ".join(version["aliases"]) or "none",
        "digest": version["digest"],
        "verdict": version["verdict"],
        "kind": f"{manifest['kind']}, rank {manifest['rank']}, alpha {manifest['alpha']:g}, {manifest['dtype']}",
        "changes": f"{manifest['module_count']} modules: {', '.join(manifest['target_modules'])}",
        "size": f"{manifest['parameter_count']:,} parameters, {size(manifest['size_bytes'])}",
    }
    if probe := version.get("probe"):
        facts["effect"] = (
            f"|Δ log-probability| {probe['mean_change']:.2g} on average, {probe['largest_change']:.2g} at most, "
            f"over {probe['tokens']} tokens"
        )
    facts |= {"tags": tags(version["tags"])} if version["tags"] else {}
    facts |= {f"score {name}": f"{value:g}" for name, value in manifest["scores"].items()}
    facts |= {key: str(value) for key, value in manifest["lineage"].items() if key in LINEAGE}
    for name, value in facts.items():
        console.print(f"  {escape(name):10} {escape(value)}", highlight=False, soft_wrap=True)
    found = (version.get("probe") or {}).get("warning")
    for warning in [*manifest["warnings"], *([found] if found else [])]:
        console.print(f"  [yellow]warning[/]    {escape(warning)}", highlight=False, soft_wrap=True)


def print_aliases(adapter: dict[str, Any], console: Console) -> dict[str, Any]:
    shown = ", ".join(f"{alias}→{target}" for alias, target in targets_of(adapter).items())
    console.print(f"[bold]{escape(adapter['name'])}[/]: {shown}", highlight=False)
    return adapter


def print_collected(answer: dict[str, Any], console: Console) -> None:
    going, dry = answer["deleted"], answer["dry_run"]
    if going:
        table = Table("version", "state", "size", "digest", box=None)
        for each in going:
            digest = each["digest"].removeprefix("sha256:")[:12]
            table.add_row(f"{each['name']}@{each['version']}", each["state"], size(each["size_bytes"]), digest)
        console.print("would be deleted:" if dry else "deleted:" if answer["done"] else "being deleted:")
        console.print(table)
    else:
        console.print("no version would go" if dry else "no version went")
    if answer["swept"]:
        console.print(f"{'would go' if dry else 'gone'}, for nobody refers to it: {', '.join(answer['swept'])}")
    for reason, meaning in answer["reasons"].items():
        kept = [f"{each['name']}@{each['version']}" for each in answer["kept"] if each["reason"] == reason]
        console.print(f"kept, {meaning}: {_some(kept)}", highlight=False, soft_wrap=True)


def print_verified(answer: dict[str, Any], console: Console) -> None:
    if answer["findings"]:
        table = Table("finding", "versions", "detail", "done about it", box=None)
        for each in answer["findings"]:
            what = f"[red]{each['what']}[/]" if each["what"] in LOST else each["what"]
            named = each["versions"] or [each["digest"].removeprefix("sha256:")[:12]]
            table.add_row(what, _some(named), escape(each["detail"]), escape(each["repaired"] or "nothing"))
        console.print(table)
    read = f"{answer['versions']} versions, {answer['blobs']} sets of files, {size(answer['size_bytes'])} read"
    console.print(f"{read}: {'all is well' if answer['sound'] else '[bold red]not all is well[/]'}", highlight=False)


def _some(words: Sequence[str]) -> str:
    return ", ".join(words[:SHOWN]) + (f" and {len(words) - SHOWN} more" if len(words) > SHOWN else "")


def targets_of(adapter: dict[str, Any]) -> dict[str, str]:
    """Alias → `3`, or `3=90 4=10` where versions share it."""
    return {alias: _target(adapter["splits"].get(alias, number)) for alias, number in adapter["aliases"].items()}


def _target(target: int | dict[str, int] | None) -> str:
    if isinstance(target, dict):
        return " ".join(f"{number}={weight}" for number, weight in target.items())
    return "none" if target is None else str(target)


def move(move: dict[str, Any]) -> str:
    ends = f"{_target(move['from'])} → {_target(move['to'])}"
    by = f" by {move['by']}" if move["by"] else ""
    return f"{ends}  {move['how']}{by}" + (" (taken back)" if move["undone"] else "")


def count_states(states: dict[str, int]) -> str:
    others = [f"{count} {state}" for state, count in states.items() if state != "ready"]
    return f"{sum(states.values())}" + (f" ({', '.join(others)})" if others else "")


def tags(tags: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in tags.items())


def shadow(alias: str, found: dict[str, Any]) -> str:
    """How a shadow does, on one line."""
    said = f"shadow of {alias}: version {found['version']} gets {found['percent']} %; {found['compared']} compared"
    if found["agreement"] is not None:
        said += f", {100 * found['agreement']:.3g} % agree"
    for what in ("errors", "dropped"):
        if found[what]:
            said += f"; {what}: " + ", ".join(f"{count} {name}" for name, count in found[what].items())
    return escape(said)


def size(count: float) -> str:
    for unit in SIZE_UNITS:
        if count < 1000 or unit == SIZE_UNITS[-1]:
            break
        count /= 1000
    return f"{count:.3g} {unit}"


def time(timestamp: int) -> str:
    return datetime.fromtimestamp(timestamp, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def day(timestamp: int) -> str:
    return time(timestamp)[:10]
