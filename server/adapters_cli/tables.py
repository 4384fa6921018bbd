"""What people read: one adapter, version or move in words. Knows the answers of the API, nothing that asks for them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.markup import escape

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
    facts |= {f"score {name}": f"{value:g}" for name, value in manifest["scores"].items()}
    for name, value in facts.items():
        console.print(f"  {name:10} {escape(value)}", highlight=False, soft_wrap=True)
    found = (version.get("probe") or {}).get("warning")
    for warning in [*manifest["warnings"], *([found] if found else [])]:
        console.print(f"  [yellow]warning[/]    {escape(warning)}", highlight=False, soft_wrap=True)


def print_aliases(adapter: dict[str, Any], console: Console) -> dict[str, Any]:
    shown = ", ".join(f"{alias}→{target}" for alias, target in targets_of(adapter).items())
    console.print(f"[bold]{escape(adapter['name'])}[/]: {shown}", highlight=False)
    return adapter


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


def count_states(versions: list[dict[str, Any]]) -> str:
    others = [version["state"] for version in versions if version["state"] != "ready"]
    return f"{len(versions)}" + (
        f" ({', '.join(f'{others.count(state)} {state}' for state in sorted(set(others)))})" if others else ""
    )


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
