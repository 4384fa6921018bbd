"""train eval: base against adapter on a data file, offline or through a server: loss, exact match, fields of JSON.

A merged model may stand where an adapter does. Through a server both are the adapter's name, and it is told which way
the answers went.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from adapters.errors import ConfigError
from adapters.train.asking import ask
from adapters.train.data import Conversation
from adapters.train.questions import Question, questions
from adapters.train.quiet import quiet_libraries
from adapters.train.reading import read_files
from adapters.train.scoring import Score, score
from adapters.train.sections import DataFile

HELP = "score an adapter against its base on a data file, offline or through a server"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="a directory, of a merged model too; with --server a name")
    parser.add_argument("--data", type=Path, required=True, action="append", metavar="FILE", help="may be repeated")
    parser.add_argument("--base", metavar="MODEL", help='directory of the base; with --server its name (default: "")')
    parser.add_argument("--server", metavar="URL", help="ask this server instead of loading anything")
    parser.add_argument("--api-key", help="bearer key for --server; default: LORAPLEX_API_KEY")
    parser.add_argument("--max-new-tokens", type=int, default=96, metavar="N")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="wrong answers to print (default: 3)")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")


def execute(arguments: argparse.Namespace, console: Console) -> None:
    reading = read_files([DataFile(path=path) for path in arguments.data])
    conversations = reading.conversations[: arguments.limit]
    asked = questions(conversations)
    expected = [question.expected for question in asked]
    judge = _served if arguments.server else _offline
    before, after = judge(arguments, conversations, asked, console)
    scores = {
        "base": score(expected, before.answers, before.loss),
        "adapter": score(expected, after.answers, after.loss),
    }
    output = Console()
    if arguments.json:
        ways = {"base": before.ways, "adapter": after.ways}
        told = {name: asdict(each) | {"ways": ways[name]} for name, each in scores.items()}
        output.print_json(json.dumps(told), indent=None)
        return
    shown = table(scores["base"], scores["adapter"])
    if before.ways and after.ways:
        shown.add_row("answered by", _told(before.ways), _told(after.ways))
    output.print(shown)
    wrong = [row for row in zip(asked, after.answers, strict=True) if row[0].expected.strip() != row[1].strip()]
    for question, answer in wrong[: arguments.show]:
        output.print(f"[bold]{escape(question.chat[-1]['content'])}[/]")
        output.print(f"  expected  {escape(question.expected)}\n  adapter   {escape(answer)}")


@dataclass(frozen=True)
class Heard:
    """Of one model."""

    answers: list[str]
    loss: float | None = None
    ways: Mapping[str, int] | None = None
    """Way of the server (`base`, `lora`, `merged`) → answers that went it."""


def _told(ways: Mapping[str, int]) -> str:
    return ", ".join(f"{way} {count}" for way, count in sorted(ways.items()))


def _offline(
    arguments: argparse.Namespace, conversations: Sequence[Conversation], asked: Sequence[Question], console: Console
) -> tuple[Heard, Heard]:
    if not arguments.base:
        raise ConfigError("--base is missing: the directory of the base; or give --server and a name that it knows")
    with quiet_libraries():
        from adapters.train.trial import trial_of

        trial = trial_of(Path(arguments.adapter), Path(arguments.base))
        results: list[Heard] = []
        with Progress(console=console, transient=True) as progress:
            for name in ("base", "adapter"):
                task = progress.add_task(f"asking the {name}", total=len(asked))
                loss = trial.loss(conversations, base=name == "base")
                answers = trial.answers(
                    asked,
                    arguments.max_new_tokens,
                    base=name == "base",
                    told=partial(progress.advance, task),
                )
                results.append(Heard(answers, loss))
    return results[0], results[1]


def _served(
    arguments: argparse.Namespace, conversations: Sequence[Conversation], asked: Sequence[Question], console: Console
) -> tuple[Heard, Heard]:
    chats = [question.chat for question in asked]
    key = arguments.api_key or os.environ.get("LORAPLEX_API_KEY")
    results: list[Heard] = []
    with Progress(console=console, transient=True) as progress:
        for name in (arguments.base or "", arguments.adapter):
            task = progress.add_task(f"asking {name or 'the base'}", total=len(chats))
            replies = ask(
                arguments.server,
                name,
                chats,
                arguments.max_new_tokens,
                key,
                partial(progress.advance, task),
            )
            ways = Counter(reply.way for reply in replies if reply.way)
            results.append(Heard([reply.text for reply in replies], ways=dict(ways) or None))
    return results[0], results[1]


def table(base: Score, adapter: Score) -> Table:
    shown = Table(f"{base.rows} rows", "base", "adapter")
    if base.loss is not None and adapter.loss is not None:
        shown.add_row("loss (nats per token)", f"{base.loss:.3f}", f"{adapter.loss:.3f}")
    shown.add_row("exact match", f"{base.exact:.1%}", f"{adapter.exact:.1%}")
    if base.fields is not None and adapter.fields is not None:
        shown.add_row("valid JSON", f"{base.valid_json:.1%}", f"{adapter.valid_json:.1%}")
        shown.add_row("same JSON", f"{base.json_match:.1%}", f"{adapter.json_match:.1%}")
        for key, share in base.fields.items():
            shown.add_row(f"  {escape(key)}", f"{share:.1%}", f"{adapter.fields[key]:.1%}")
    return shown
