"""`loraplex merge` and `loraplex export` with `--server`: the server does it, this asks, follows, downloads and checks.

Exit codes as of `loraplex adapters`. Ctrl-C while a job is followed cancels it; while files come, the next call goes
on with what is there.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from adapters.download import download
from adapters.errors import AdapterError
from adapters.merge.bases import ASKED
from adapters.merge.combine import METHODS, SignMethod
from adapters.merge.export.exporting import FORMATS
from adapters.merge.plan import DTYPES
from adapters.remote import Remote
from server.adapters_cli import jobs, tables

SERVER = "--server"
OF_A_MERGE = ("--from", "--data", "--max-kl", "--max-loss-increase", "--accept-loss")
"""Flags of what is merged into its base."""
OF_SEVERAL = ("--promote", "--method", "--weights", "--density", "--majority-sign", "--seed", "--rank")


def is_meant(argv: Sequence[str]) -> bool:
    """Whether a server shall do it."""
    return any(word == SERVER or word.startswith(f"{SERVER}=") for word in argv)


def merge_main(argv: Sequence[str]) -> int:
    return _main(parse_merge(argv), _merge)


def export_main(argv: Sequence[str]) -> int:
    return _main(parse_export(argv), _export)


def parse_merge(argv: Sequence[str]) -> argparse.Namespace:
    """Ends the process with exit code 2 for words that make no sense."""
    parser = _merge_parser()
    arguments = parser.parse_args(argv)
    _require_words(parser, arguments)
    return arguments


def parse_export(argv: Sequence[str]) -> argparse.Namespace:
    parser = _export_parser()
    arguments = parser.parse_args(argv)
    if arguments.format == "gguf-lora":
        _require_absent(parser, arguments, OF_A_MERGE, "is for what is merged; gguf-lora is the adapter alone")
    _require_one_file(parser, arguments)
    return arguments


def _main(arguments: argparse.Namespace, run: Callable[[Remote, argparse.Namespace, Console], dict[str, Any]]) -> int:
    try:
        with Remote(arguments.server, arguments.api_key) as remote:
            answer = run(remote, arguments, Console(quiet=arguments.json))
    except AdapterError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(error.message)} ({error.code})", soft_wrap=True)
        return 1
    if arguments.json:
        Console(soft_wrap=True, highlight=False, markup=False).print(json.dumps(answer, indent=2))
    return 0


def _require_words(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    count = len(arguments.adapters)
    if (count > 1) != (arguments.into is not None):
        parser.error("--into names the adapter that several adapters become")
    if count > 1 and arguments.weights is not None and len(arguments.weights) != count:
        parser.error(f"{count} adapters and {len(arguments.weights)} weights; give one for each")
    if count > 1:
        why = "is for one adapter; `loraplex adapters pull` downloads the one that several become"
        _require_absent(parser, arguments, ("--out",), why)
        _require_absent(parser, arguments, ("--dtype", *OF_A_MERGE), "is for one adapter, merged into its base")
    else:
        _require_absent(parser, arguments, OF_SEVERAL, "is for several adapters that become one")
    _require_one_file(parser, arguments)


def _require_absent(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, flags: Sequence[str], why: str
) -> None:
    """What would have no effect is not taken: whoever gives it expects one."""
    for flag in flags:
        name = "values" if flag == "--from" else flag.removeprefix("--").replace("-", "_")
        if getattr(arguments, name) != parser.get_default(name):
            parser.error(f"{flag} {why}")


def _require_one_file(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if len(arguments.data) > 1:
        parser.error("a server measures on one file; put the rows together and give --data once")


def _merge(remote: Remote, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    if len(arguments.adapters) == 1:
        wish = {"adapter": arguments.adapters[0], "dtype": arguments.dtype, **_budget(arguments)}
        with _rows(remote, arguments) as rows:
            job = remote.merge(wish | rows)
            if arguments.no_wait:
                return _told(job, console)
            made = jobs.follow(remote, job, console)["result"]["export"]
        return _taken(remote, made, arguments.out, console)
    job = remote.merge(_several(arguments))
    if arguments.no_wait:
        return _told(job, console)
    result: dict[str, Any] = jobs.follow(remote, job, console)["result"]
    known = "" if result["created"] else ", which it was already: the same files"
    console.print(f"[bold]{result['name']}@{result['version']}[/]{known}", highlight=False)
    far, error = result["distance_from_sum"], result["composition_error"]
    console.print(f"  {far:.2%} away from the plain sum; the limit of the rank left out {error:.2%}", highlight=False)
    return result


def _several(arguments: argparse.Namespace) -> dict[str, Any]:
    count = len(arguments.adapters)
    weights = arguments.weights or [1 / count] * count
    given = {"density": arguments.density, "svd_rank": arguments.rank}
    return {
        "adapters": [
            {"model": each, "weight": weight} for each, weight in zip(arguments.adapters, weights, strict=True)
        ],
        "method": arguments.method,
        "majority_sign_method": arguments.majority_sign,
        "seed": arguments.seed,
        "into": {"name": arguments.into, "promote": arguments.promote},
        **{key: value for key, value in given.items() if value is not None},
    }


def _export(remote: Remote, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    given = {} if arguments.outtype is None else {"outtype": arguments.outtype}
    merged = {} if arguments.format == "gguf-lora" else _budget(arguments)
    given |= {"accept_differences": True} if arguments.accept_differences else {}
    with _rows(remote, arguments) as rows:
        export = remote.export({"adapter": arguments.adapter, "format": arguments.format, **given, **merged, **rows})
        if export["state"] != "ready":
            if arguments.no_wait:
                console.print(f"{export['id']}, {export['state']}", highlight=False)
                return export
            jobs.follow(remote, export["job"], console)
    return _taken(remote, export["id"], arguments.out, console)


@contextmanager
def _rows(remote: Remote, arguments: argparse.Namespace) -> Iterator[dict[str, str]]:
    """The field that names the rows of `--data`, which are at the server for as long as their job is followed."""
    if not arguments.data:
        yield {}
        return
    file = remote.create_file(arguments.data[0])["id"]
    try:
        yield {"validation_file": file}
    finally:
        if not arguments.no_wait:
            with suppress(AdapterError):  # what went wrong before is what is told
                remote.delete_file(file)


def _taken(remote: Remote, export_id: str, out: Path | None, console: Console) -> dict[str, Any]:
    export = remote.export_of(export_id)
    console.print(f"[bold]{export['id']}[/] {export['format']} of {export['adapter']}", highlight=False)
    for line in _measured(export["report"]):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    if out is not None:
        _download(remote, export, out, console)
    where = remote.server if out is None else out
    for file in export["files"]:
        place = f"{where}{file['href']}" if out is None else str(out / file["name"])
        console.print(f"  {tables.size(file['size_bytes']):>9}  {escape(place)}", highlight=False, soft_wrap=True)
    return export


def _download(remote: Remote, export: Mapping[str, Any], out: Path, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("downloading", total=export["size_bytes"])
        sums = {file["name"]: file["sha256"] for file in export["files"]}
        download(
            export["files"],
            lambda file, offset: remote.read_export(export["id"], file, sums[file], offset),
            out,
            lambda file, count: bar.update(task, advance=count, description=escape(file)),
        )


def _measured(report: Mapping[str, Any]) -> list[str]:
    return [*_of_the_merge(report.get("fidelity")), *_of_the_export(report.get("export"))]


def _of_the_export(record: Mapping[str, Any] | None) -> list[str]:
    if record is None or (check := record["check"]) is None:
        return []
    return [
        f"loaded again by {check['by']}: {check['kl']:.5f} nats per token (KL) from its source, the same likeliest "
        f"token {check['same_first']:.1%}"
    ]


def _of_the_merge(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    task, general = found["task"], found["general"]
    above = "" if found["within_budget"] else ", above the budget"
    return [
        f"{found['judged']}: {task['kl']:.4f} nats per token (KL) from the adapter on {found['probes']}{above}",
        f"the same likeliest token {task['same_top']:.1%}; loss {task['loss_increase']:+.4f}, on general text "
        f"{general['loss_increase']:+.4f}",
    ]


def _told(job: dict[str, Any], console: Console) -> dict[str, Any]:
    console.print(f"{job['id']}; see `loraplex jobs show {job['id']}`", highlight=False, soft_wrap=True)
    return job


def _budget(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {"max_kl": arguments.max_kl, "max_loss_increase": arguments.max_loss_increase}
    given |= {"accept_loss": arguments.accept_loss or None}
    return {"base": arguments.values, **{key: value for key, value in given.items() if value is not None}}


def _merge_parser() -> argparse.ArgumentParser:
    made = _common("merge", "Have a server put an adapter into its base, or several into a new adapter.")
    made.add_argument("adapters", nargs="+", metavar="NAME@REF", help="as the server names them")
    made.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of one model (default: bfloat16)")
    several = made.add_argument_group("several adapters")
    several.add_argument("--into", metavar="NAME", help="the adapter that they become")
    several.add_argument("--promote", action="store_true", help="move its alias `default` there")
    several.add_argument("--method", choices=METHODS, default="svd", help="as PEFT names them (default: svd)")
    several.add_argument("--weights", type=float, nargs="+", metavar="W", help="one for each (default: equal, sum 1)")
    several.add_argument("--density", type=float, metavar="SHARE")
    several.add_argument("--majority-sign", choices=get_args(SignMethod), default="total")
    several.add_argument("--seed", type=int, default=0)
    several.add_argument("--rank", type=int, metavar="R", help="at most (default: the server's max_lora_rank)")
    return made


def _export_parser() -> argparse.ArgumentParser:
    made = _common("export", "Have a server write a version, merged or alone, as other programs load it.")
    made.add_argument("adapter", metavar="NAME@REF", help="as the server names it")
    made.add_argument("--format", choices=FORMATS, required=True)
    made.add_argument("--outtype", help="of the weights: bf16, f16, f32, or q8_0, as the format has them")
    made.add_argument(
        "--accept-differences", action="store_true", help="take a GGUF that reads texts or chats otherwise"
    )
    return made


def _common(verb: str, description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=f"loraplex {verb} --server URL", description=description)
    made.add_argument(SERVER, required=True, help="its URL")
    made.add_argument("--api-key", default=os.environ.get("LORAPLEX_API_KEY"), help="default: LORAPLEX_API_KEY")
    made.add_argument("--out", type=Path, metavar="DIR", help="download the files to here, each checked")
    made.add_argument("--from", dest="values", choices=ASKED, default="auto", help="the base's values (default: auto)")
    made.add_argument(
        "--data",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="rows of the task, sent to the server to measure on; with --no-wait they stay in /v1/files",
    )
    made.add_argument("--max-kl", type=float, metavar="NATS", help="per token, that the merge may be off")
    made.add_argument("--max-loss-increase", type=float, metavar="NATS", help="per token")
    made.add_argument("--accept-loss", action="store_true", help="take it however far it is")
    made.add_argument("--no-wait", action="store_true", help="do not follow the job")
    made.add_argument("--json", action="store_true", help="print the answer as JSON")
    return made
