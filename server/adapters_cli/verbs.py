"""One function a verb: calls the adapters' API, prints for people, returns what `--json` prints. Knows no HTTP."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from adapters.names import DEFAULT
from adapters.pull import pull as fetch
from adapters.remote import Remote
from server.adapters_cli import jobs, tables

if TYPE_CHECKING:
    from server.offline import Offline

    Shop = Remote | Offline


def push(shop: Shop, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Upload a PEFT directory or an archive of one, or have the server fetch it: hf://org/name, s3://bucket/folder."""
    if "://" in arguments.path and isinstance(shop, Remote):
        return _push_source(shop, arguments, console)
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=console, transient=True
    )

    def opener(path: Path) -> IO[bytes]:
        return progress.open(path, "rb", description=path.name)

    with progress:
        version = shop.upload(
            Path(arguments.path),
            arguments.name,
            description=arguments.description,
            promote=not arguments.no_promote,
            max_error=arguments.max_error,
            tags=dict(arguments.tag),
            opener=opener,
        )
    return _pushed(version, version["created"], console)


def _push_source(remote: Remote, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    fields = {"description": arguments.description, "sha256": arguments.sha256}
    given = {name: value for name, value in fields.items() if value is not None}
    tags = dict(arguments.tag)
    asked = {"promote": not arguments.no_promote, "max_error": arguments.max_error, "tags": tags, **given}
    job = remote.fetch(arguments.path, arguments.name, **asked)
    if arguments.no_wait:
        console.print(f"{job['id']}; see `loraplex jobs show {job['id']}`", highlight=False, soft_wrap=True)
        return job
    result = jobs.follow(remote, job, console)["result"]
    version = remote.tried(remote.version(result["name"], str(result["version"]))) | {"created": result["created"]}
    return _pushed(version, result["created"], console)


def _pushed(version: dict[str, Any], created: bool, console: Console) -> dict[str, Any]:
    known = "" if created else ", which it was already: the same files"
    console.print(f"[bold]{version['name']}@{version['version']}[/]{known}", highlight=False)
    tables.print_version(version, console)
    return version


def list_adapters(shop: Shop, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Every adapter, a row each; or those with a name, a tag, a version in a state."""
    found = list(shop.overviews(name=arguments.name, tags=arguments.tag, state=arguments.state))
    table = Table("adapter", "default", "aliases", "versions", "resident", "made", "description", box=None)
    for adapter in found:
        targets = tables.targets_of(adapter)
        default = targets.pop(DEFAULT, "-")
        table.add_row(
            escape(adapter["name"]),
            default,
            ", ".join(f"{alias}→{target}" for alias, target in targets.items()),
            tables.count_states(adapter["states"]),
            str(adapter["resident"]),
            tables.day(adapter["created_at"]),
            escape((adapter["description"] or "").splitlines()[0][:60] if adapter["description"] else ""),
        )
    if found:
        console.print(table)
    elif arguments.name or arguments.tag or arguments.state:
        console.print(f"no such adapters on {shop.server}")
    else:
        console.print(f"no adapters on {shop.server}; push one with `loraplex adapters push DIRECTORY --name NAME`")
    return {"data": found}


def show(shop: Shop, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """An adapter with its versions and the moves of its default alias; with `name@ref`, one version."""
    name, _, ref = arguments.name.partition("@")
    if ref:
        version = shop.version(name, ref)
        console.print(f"[bold]{version['name']}@{version['version']}[/]", highlight=False)
        tables.print_version(version, console)
        return version
    adapter = shop.adapter(name)
    console.print(f"[bold]{escape(name)}[/] {escape(adapter['description'] or '')}", highlight=False)
    if adapter["tags"]:
        console.print(f"tags: {escape(tables.tags(adapter['tags']))}", highlight=False)
    table = Table("version", "status", "aliases", "leases", "waiting", "made", "digest", "tags", box=None)
    for version in adapter["versions"]:
        reason = f": {version['reason']}" if version["reason"] else ""
        table.add_row(
            str(version["version"]),
            escape(version["status"] + reason),
            ", ".join(version["aliases"]),
            str(version["leases"] or ""),
            str(version["waiting"] or ""),
            tables.day(version["created_at"]),
            version["digest"].removeprefix("sha256:")[:12],
            escape(tables.tags(version["tags"])),
        )
    console.print(table)
    for alias in adapter["shadows"]:
        console.print(tables.shadow(alias, shop.shadow(name, alias)), highlight=False)
    moves = [f"  {tables.time(move['at'])}  {tables.move(move)}" for move in shop.alias(name, DEFAULT)["moves"][:8]]
    console.print(f"moves of the alias {DEFAULT}, the latest first:\n" + escape("\n".join(moves)), highlight=False)
    return adapter


def pull(shop: Shop, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Write the files of a version into a directory, as PEFT reads them; each is checked."""
    name, _, ref = arguments.name.partition("@")
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=console, transient=True
    )
    shown: dict[str, TaskID] = {}

    def advance(file: str, size: int, count: int) -> None:
        if file not in shown:
            shown[file] = progress.add_task(file, total=size)
        progress.advance(shown[file], count)

    with progress:
        version, written = fetch(shop, name, ref or DEFAULT, arguments.directory, advance)
    known = "" if written else ", which was there already"
    console.print(
        f"[bold]{version['name']}@{version['version']}[/] in {escape(str(arguments.directory))}{known}",
        highlight=False,
        soft_wrap=True,
    )
    return version | {"directory": str(arguments.directory), "written": written}


def promote(shop: Shop, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Move an alias to a version."""
    return tables.print_aliases(shop.set_alias(arguments.name, arguments.alias, {arguments.version: 1}), console)


def split(shop: Shop, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Share the traffic of an alias among versions, by weight: `3=90 4=10`. A user always gets the same one."""
    return tables.print_aliases(shop.set_alias(arguments.name, arguments.alias, dict(arguments.share)), console)


def rollback(shop: Shop, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Take back the last move of an alias."""
    return tables.print_aliases(shop.rollback(arguments.name, arguments.alias), console)


def shadow(shop: Shop, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Ask some of an alias's requests again of another version, and compare the answers; `show` says how they agree."""
    wanted = None if arguments.off else {"version": arguments.version, "percent": arguments.percent}
    adapter = shop.set_shadow(arguments.name, arguments.alias, wanted)
    found = adapter["shadows"].get(arguments.alias)
    said = f"version {found['version']} gets {found['percent']} % of its requests" if found else "no shadow"
    console.print(f"[bold]{escape(adapter['name'])}@{escape(arguments.alias)}[/]: {said}", highlight=False)
    return adapter


def tag(shop: Shop, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Tag an adapter, or with `name@3` a version: `team=search`; `team-` takes a tag away."""
    name, _, ref = arguments.name.partition("@")
    number = shop.version(name, ref)["version"] if ref else None
    answer = shop.edit(name, number, dict(arguments.change))
    shown = tables.tags(answer["tags"]) or "no tags"
    console.print(f"[bold]{escape(arguments.name)}[/]: {escape(shown)}", highlight=False, soft_wrap=True)
    return answer


def remove(shop: Shop, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Delete an adapter, or with `name@3` a version; running requests finish first."""
    name, _, ref = arguments.name.partition("@")
    number = shop.version(name, ref)["version"] if ref else None
    answer = shop.delete(name, number, arguments.wait_s, force=arguments.force)
    done = "deleted" if answer["deleted"] else "still draining, and will be deleted:"
    console.print(f"{done} {', '.join(answer['versions'])}", highlight=False)
    for cut, requests in answer["cut"].items():
        console.print(f"cut off {requests} requests of {cut}", highlight=False)
    return answer


def collect(shop: Shop, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Delete the older versions that nothing needs, and files nobody refers to. --dry-run first says which."""
    answer = shop.gc(arguments.keep, name=arguments.name, dry_run=arguments.dry_run, wait_s=arguments.wait_s)
    tables.print_collected(answer, console)
    return answer


def verify(shop: Shop, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Read and hash every stored file again. Exit code 1 when something is wrong that was not put right."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console, transient=True
    ) as progress:
        task = progress.add_task("reading", total=None)

        def advance(done: int, total: int, ref: str) -> None:
            progress.update(task, completed=done, total=total, description=ref)

        answer = shop.verify(repair=arguments.repair, progress=advance)
    tables.print_verified(answer, console)
    return answer
