"""`loraplex adapters`: its words and flags, and what they lead to.

Tables for people; `--json` prints the answer instead. Exit codes: 0 done · 1 refused, not reachable or not sound ·
2 wrongly called.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from adapters.errors import AdapterError
from adapters.names import DEFAULT
from adapters.remote import Remote
from server.adapters_cli import verbs as do

SERVER = "http://127.0.0.1:8000"


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.run is do.shadow and arguments.off == (arguments.version is not None):
        parser.error("shadow: expected either a version or --off")
    run: Callable[[do.Shop, argparse.Namespace, Console], dict[str, Any]] = arguments.run
    console = Console(quiet=arguments.json)
    try:
        with _shop(arguments) as shop:
            answer = run(shop, arguments, console)
    except AdapterError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(error.message)} ({error.code})", soft_wrap=True)
        return 1
    if arguments.json:
        Console(soft_wrap=True, highlight=False, markup=False).print(json.dumps(answer, indent=2))
    return 0 if answer.get("sound", True) else 1


def _shop(arguments: argparse.Namespace) -> do.Shop:
    if arguments.data_dir is None:
        return Remote(arguments.server or os.environ.get("LORAPLEX_SERVER", SERVER), arguments.api_key)
    from server.offline import Offline  # what it shows is made by the server's own modules, slow to import

    return Offline(arguments.data_dir, arguments.database_url, arguments.store_url)


Verb = Callable[[str, Callable[..., dict[str, Any]]], argparse.ArgumentParser]
"""Makes the parser of a verb, by its name and what it runs."""


def _parser() -> argparse.ArgumentParser:
    common = _common()
    parser = argparse.ArgumentParser(prog="loraplex adapters", description="The adapters of a server, or of a store.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Callable[..., dict[str, Any]]) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, parents=[common], help=run.__doc__, description=run.__doc__)
        made.set_defaults(run=run)
        return made

    for add in (_add_push, _add_reading, _add_moving, _add_removing):
        add(verb)
    return parser


def _common() -> argparse.ArgumentParser:
    """Whom to ask, and how to answer."""
    common = argparse.ArgumentParser(add_help=False)
    asked = common.add_mutually_exclusive_group()
    asked.add_argument("--server", help=f"its URL (default: LORAPLEX_SERVER, or {SERVER})")
    asked.add_argument("--data-dir", type=Path, help="ask the store itself, without a server: the server's data_dir")
    common.add_argument("--api-key", default=os.environ.get("LORAPLEX_API_KEY"), help="default: LORAPLEX_API_KEY")
    for flag, variable in (("--database-url", "LORAPLEX_DATABASE_URL"), ("--store-url", "LORAPLEX_STORE_URL")):
        common.add_argument(flag, default=os.environ.get(variable), help=f"with --data-dir (default: {variable})")
    common.add_argument("--json", action="store_true", help="print the answer as JSON")
    return common


def _add_push(verb: Verb) -> None:
    pushing = verb("push", do.push)
    pushing.add_argument("path", help="a directory or an archive here, or a source that the server reads")
    pushing.add_argument("--name", required=True)
    pushing.add_argument("--description")
    pushing.add_argument(
        "--max-error",
        type=float,
        default=0.0,
        help="accept that this share of what it changes is lost where it must be converted (default: 0)",
    )
    pushing.add_argument("--sha256", help="of what a source gives: of its archive, else of adapter_model.safetensors")
    pushing.add_argument("--no-wait", action="store_true", help="of a source: do not follow the job, print its id")
    pushing.add_argument("--no-promote", action="store_true", help=f"leave the alias {DEFAULT} where it is")
    pushing.add_argument(
        "--tag", action="append", type=_tag, default=[], metavar="KEY=VALUE", help="of the version; may be given again"
    )


def _add_reading(verb: Verb) -> None:
    listing = verb("list", do.list_adapters)
    listing.add_argument("name", nargs="?", help="one name, or how it begins: 'pirate-*'")
    listing.add_argument(
        "--tag", action="append", default=[], metavar="KEY[=VALUE]", help="with this tag; may be given again"
    )
    listing.add_argument("--state", help="with a version in this state: ready, quarantined, …")
    verb("show", do.show).add_argument("name", help="name, name@3, name@alias or name@sha256:…")
    pulling = verb("pull", do.pull)
    pulling.add_argument("name", help="name, name@3, name@alias or name@sha256:…")
    pulling.add_argument("directory", type=Path, help="one that is empty, or not there yet")


def _add_moving(verb: Verb) -> None:
    promoting = verb("promote", do.promote)
    promoting.add_argument("name")
    promoting.add_argument("version", type=int)
    splitting = verb("split", do.split)
    splitting.add_argument("name")
    splitting.add_argument("share", nargs="+", type=_share, metavar="VERSION=WEIGHT")
    rolling = verb("rollback", do.rollback)
    rolling.add_argument("name")
    for each in (promoting, splitting, rolling):
        each.add_argument("--alias", default=DEFAULT, help=f"default: {DEFAULT}")
    shadowing = verb("shadow", do.shadow)
    shadowing.add_argument("name")
    shadowing.add_argument("version", type=int, nargs="?", help="the shadow; leave it out with --off")
    shadowing.add_argument("--percent", type=int, default=10, help="how many of a hundred requests (default: 10)")
    shadowing.add_argument("--off", action="store_true", help="no shadow any more")
    shadowing.add_argument("--alias", default=DEFAULT, help=f"default: {DEFAULT}")
    tagging = verb("tag", do.tag)
    tagging.add_argument("name", help="name, or name@3 for one version")
    tagging.add_argument("change", nargs="+", type=_change, metavar="KEY=VALUE|KEY-")


def _add_removing(verb: Verb) -> None:
    removing = verb("rm", do.remove)
    removing.add_argument("name", help="name, or name@3 for one version")
    removing.add_argument("--force", action="store_true", help="cut off the requests that run")
    collecting = verb("gc", do.collect)
    collecting.add_argument("name", nargs="?", help="one adapter alone (default: all)")
    collecting.add_argument("--keep", type=_count, help="newest that stay (default: the server's keep_versions)")
    collecting.add_argument("--dry-run", action="store_true", help="say what would go, and why the rest stays")
    for each in (removing, collecting):
        each.add_argument(
            "--wait-s", type=float, default=30, help="how long to wait for running requests (default: 30)"
        )
    verb("verify", do.verify).add_argument(
        "--repair", action="store_true", help="put right what can be, and take out of service what cannot"
    )


def _tag(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected KEY=VALUE, for example team=search")
    return key, value


def _change(text: str) -> tuple[str, str | None]:
    if "=" not in text and text.endswith("-"):
        return text[:-1], None
    return _tag(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 1 on")
    return int(text)


def _share(text: str) -> tuple[int, int]:
    number, _, weight = text.partition("=")
    if not (number.isdecimal() and weight.isdecimal()):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected VERSION=WEIGHT, for example 3=90")
    return int(number), int(weight)
