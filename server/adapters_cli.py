"""`loraplex adapters`: the adapters of a running server, from the command line.

Tables for people; `--json` prints the server's answer instead. Exit codes: 0 done · 1 refused or not reachable ·
2 wrongly called. Knows the calls of `adapters.remote`, no HTTP.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

from adapters.errors import AdapterError
from adapters.names import DEFAULT
from adapters.remote import Remote

SERVER = "http://127.0.0.1:8000"
SIZE_UNITS = ("B", "kB", "MB", "GB")


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    run: Callable[[Remote, argparse.Namespace, Console], dict[str, Any]] = arguments.run
    console = Console(quiet=arguments.json)
    try:
        with Remote(arguments.server, arguments.api_key) as remote:
            answer = run(remote, arguments, console)
    except AdapterError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(error.message)} ({error.code})", soft_wrap=True)
        return 1
    if arguments.json:
        Console(soft_wrap=True, highlight=False, markup=False).print(json.dumps(answer, indent=2))
    return 0


def push(remote: Remote, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Upload a PEFT directory or an archive of one."""
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=console, transient=True
    )

    def opener(path: Path) -> IO[bytes]:
        return progress.open(path, "rb", description=path.name)

    with progress:
        version = remote.upload(
            arguments.path,
            arguments.name,
            description=arguments.description,
            promote=not arguments.no_promote,
            max_error=arguments.max_error,
            opener=opener,
        )
    known = "" if version["created"] else ", which it was already: the same files"
    console.print(f"[bold]{version['name']}@{version['version']}[/]{known}", highlight=False)
    _facts(version, console)
    return version


def list_adapters(remote: Remote, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Every adapter, a row each."""
    found = list(remote.adapters())
    table = Table("adapter", "default", "aliases", "versions", "resident", "made", "description", box=None)
    for adapter in found:
        targets = _targets(adapter)
        default = targets.pop(DEFAULT, "-")
        table.add_row(
            escape(adapter["name"]),
            default,
            ", ".join(f"{alias}→{target}" for alias, target in targets.items()),
            _count_states(adapter["versions"]),
            str(sum(version["resident"] for version in adapter["versions"])),
            _day(adapter["created_at"]),
            escape((adapter["description"] or "").splitlines()[0][:60] if adapter["description"] else ""),
        )
    if found:
        console.print(table)
    else:
        console.print(f"no adapters on {remote.server}; push one with `loraplex adapters push DIRECTORY --name NAME`")
    return {"data": found}


def show(remote: Remote, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """An adapter with its versions and the moves of its default alias; with `name@ref`, one version."""
    name, _, ref = arguments.name.partition("@")
    if ref:
        version = remote.version(name, ref)
        console.print(f"[bold]{version['name']}@{version['version']}[/]", highlight=False)
        _facts(version, console)
        return version
    adapter = remote.adapter(name)
    console.print(f"[bold]{escape(name)}[/] {escape(adapter['description'] or '')}", highlight=False)
    table = Table("version", "status", "aliases", "leases", "waiting", "made", "digest", box=None)
    for version in adapter["versions"]:
        reason = f": {version['reason']}" if version["reason"] else ""
        table.add_row(
            str(version["version"]),
            escape(version["status"] + reason),
            ", ".join(version["aliases"]),
            str(version["leases"] or ""),
            str(version["waiting"] or ""),
            _day(version["created_at"]),
            version["digest"].removeprefix("sha256:")[:12],
        )
    console.print(table)
    moves = [f"  {_time(move['at'])}  {_move(move)}" for move in remote.alias(name, DEFAULT)["moves"][:8]]
    console.print(f"moves of the alias {DEFAULT}, the latest first:\n" + escape("\n".join(moves)), highlight=False)
    return adapter


def promote(remote: Remote, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Move an alias to a version."""
    return _aliases(remote.set_alias(arguments.name, arguments.alias, {arguments.version: 1}), console)


def split(remote: Remote, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Share the traffic of an alias among versions, by weight: `3=90 4=10`. A user always gets the same one."""
    return _aliases(remote.set_alias(arguments.name, arguments.alias, dict(arguments.share)), console)


def rollback(remote: Remote, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Take back the last move of an alias."""
    return _aliases(remote.rollback(arguments.name, arguments.alias), console)


def remove(remote: Remote, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Delete an adapter, or with `name@3` a version; running requests finish first."""
    name, _, ref = arguments.name.partition("@")
    number = remote.version(name, ref)["version"] if ref else None
    answer = remote.delete(name, number, arguments.wait_s)
    done = "deleted" if answer["deleted"] else "still draining, and will be deleted:"
    console.print(f"{done} {', '.join(answer['versions'])}", highlight=False)
    return answer


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--server",
        default=os.environ.get("LORAPLEX_SERVER", SERVER),
        help=f"its URL (default: LORAPLEX_SERVER, or {SERVER})",
    )
    common.add_argument("--api-key", default=os.environ.get("LORAPLEX_API_KEY"), help="default: LORAPLEX_API_KEY")
    common.add_argument("--json", action="store_true", help="print the answer as JSON")

    parser = argparse.ArgumentParser(prog="loraplex adapters", description="The adapters of a running server.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Callable[..., dict[str, Any]]) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, parents=[common], help=run.__doc__, description=run.__doc__)
        made.set_defaults(run=run)
        return made

    pushing = verb("push", push)
    pushing.add_argument("path", type=Path)
    pushing.add_argument("--name", required=True)
    pushing.add_argument("--description")
    pushing.add_argument(
        "--max-error",
        type=float,
        default=0.0,
        help="accept that this share of what it changes is lost where it must be converted (default: 0)",
    )
    pushing.add_argument("--no-promote", action="store_true", help=f"leave the alias {DEFAULT} where it is")
    verb("list", list_adapters)
    verb("show", show).add_argument("name", help="name, name@3, name@alias or name@sha256:…")
    promoting = verb("promote", promote)
    promoting.add_argument("name")
    promoting.add_argument("version", type=int)
    splitting = verb("split", split)
    splitting.add_argument("name")
    splitting.add_argument("share", nargs="+", type=_share, metavar="VERSION=WEIGHT")
    rolling = verb("rollback", rollback)
    rolling.add_argument("name")
    for each in (promoting, splitting, rolling):
        each.add_argument("--alias", default=DEFAULT, help=f"default: {DEFAULT}")
    removing = verb("rm", remove)
    removing.add_argument("name", help="name, or name@3 for one version")
    removing.add_argument(
        "--wait-s", type=float, default=30, help="how long to wait for running requests (default: 30)"
    )
    return parser


def _share(text: str) -> tuple[int, int]:
    number, _, weight = text.partition("=")
    if not (number.isdecimal() and weight.isdecimal()):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected VERSION=WEIGHT, for example 3=90")
    return int(number), int(weight)


def _facts(version: dict[str, Any], console: Console) -> None:
    manifest = version["manifest"]
    facts = {
        "status": version["status"] + (f": {version['reason']}" if version["reason"] else ""),
        "aliases": ", ".join(version["aliases"]) or "none",
        "digest": version["digest"],
        "verdict": version["verdict"],
        "kind": f"{manifest['kind']}, rank {manifest['rank']}, alpha {manifest['alpha']:g}, {manifest['dtype']}",
        "changes": f"{manifest['module_count']} modules: {', '.join(manifest['target_modules'])}",
        "size": f"{manifest['parameter_count']:,} parameters, {_size(manifest['size_bytes'])}",
    }
    facts |= {f"score {name}": f"{value:g}" for name, value in manifest["scores"].items()}
    for name, value in facts.items():
        console.print(f"  {name:10} {escape(value)}", highlight=False, soft_wrap=True)
    for warning in manifest["warnings"]:
        console.print(f"  [yellow]warning[/]    {escape(warning)}", highlight=False, soft_wrap=True)


def _aliases(adapter: dict[str, Any], console: Console) -> dict[str, Any]:
    shown = ", ".join(f"{alias}→{target}" for alias, target in _targets(adapter).items())
    console.print(f"[bold]{escape(adapter['name'])}[/]: {shown}", highlight=False)
    return adapter


def _targets(adapter: dict[str, Any]) -> dict[str, str]:
    """Alias → `3`, or `3=90 4=10` where versions share it."""
    return {alias: _target(adapter["splits"].get(alias, number)) for alias, number in adapter["aliases"].items()}


def _target(target: int | dict[str, int] | None) -> str:
    if isinstance(target, dict):
        return " ".join(f"{number}={weight}" for number, weight in target.items())
    return "none" if target is None else str(target)


def _move(move: dict[str, Any]) -> str:
    ends = f"{_target(move['from'])} → {_target(move['to'])}"
    by = f" by {move['by']}" if move["by"] else ""
    return f"{ends}  {move['how']}{by}" + (" (taken back)" if move["undone"] else "")


def _count_states(versions: list[dict[str, Any]]) -> str:
    others = [version["state"] for version in versions if version["state"] != "ready"]
    return f"{len(versions)}" + (
        f" ({', '.join(f'{others.count(state)} {state}' for state in sorted(set(others)))})" if others else ""
    )


def _size(count: float) -> str:
    for unit in SIZE_UNITS:
        if count < 1000 or unit == SIZE_UNITS[-1]:
            break
        count /= 1000
    return f"{count:.3g} {unit}"


def _time(timestamp: int) -> str:
    return datetime.fromtimestamp(timestamp, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _day(timestamp: int) -> str:
    return _time(timestamp)[:10]
