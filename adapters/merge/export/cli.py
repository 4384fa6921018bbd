"""`loraplex export` (`python -m adapters.merge.export`): the words, the bar, errors into exit codes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from adapters.errors import Conflict, InvalidAdapter, MergeError, NotExportable, NotTheSame
from adapters.merge.bases import ASKED
from adapters.merge.ending import ExitCodes, ended
from adapters.merge.export.exporting import FORMATS, TOKENS, TYPES, Wish, export
from adapters.merge.export.progress import Told

EXIT_CODES: ExitCodes = (
    (InvalidAdapter, 3, "the adapter is not what it should be, or of another base"),
    (NotExportable, 4, "it cannot be written in this format"),
    (MergeError, 5, "the adapter cannot be merged"),
    (Conflict, 6, "something else is in the way"),
    (NotTheSame, 7, "loaded again, it computes something else"),
)
EPILOG = "Exit codes: 0 done, 1 failed, 2 command line, {}, 130 stopped at once. Nothing is left but of a 0."


def main(argv: Sequence[str]) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in adapters/train/cli.py
    arguments = parser().parse_args(argv)
    console = Console(stderr=True)
    return ended(lambda: execute(arguments, console), EXIT_CODES, console, "nothing was written")


def execute(arguments: argparse.Namespace, console: Console) -> None:
    with _bar(console) as told:
        record = export(wish(arguments), told)
    for line in _lines(arguments.out, record):
        Console().print(line, soft_wrap=True, markup=False, highlight=False)


def parser() -> argparse.ArgumentParser:
    codes = ", ".join(f"{code} {meaning}" for _, code, meaning in EXIT_CODES)
    types = "; ".join(f"{name}: {', '.join(types)}" for name, types in TYPES.items())
    made = argparse.ArgumentParser(
        prog="loraplex export",
        description="Write a merged model, or an adapter, as other programs load it; load it again and measure.",
        epilog=EPILOG.format(codes),
    )
    made.add_argument("source", type=Path, metavar="SOURCE", help="a directory: a merged model, or an adapter")
    made.add_argument("--format", choices=FORMATS, required=True)
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="becomes a directory with the files")
    made.add_argument("--outtype", metavar="TYPE", help=f"the first is the default ({types})")
    made.add_argument("--base", type=Path, metavar="MODEL_DIR", help="of an adapter: the base it was trained on")
    made.add_argument(
        "--from",
        dest="values",
        choices=ASKED,
        default="auto",
        help="the base's values that an adapter is merged into, as for `loraplex merge` (default: auto)",
    )
    made.add_argument("--name", help="of the model, in its metadata and card")
    made.add_argument("--license", help="as its base allows, such as apache-2.0 (default: what the base's card says)")
    made.add_argument("--ollama", action="store_true", help="a Modelfile beside the GGUF")
    check = made.add_argument_group("loading it again")
    check.add_argument(
        "--tokens", type=int, default=TOKENS, help=f"compared with the source (default: {TOKENS}; 0: none)"
    )
    check.add_argument("--max-kl", type=float, metavar="NATS", help="per token (default: 0.01; nf4: any)")
    check.add_argument("--accept-loss", action="store_true", help="keep what differs by more, and say so in its card")
    check.add_argument(
        "--accept-differences", action="store_true", help="keep what reads texts or chats otherwise, and say so"
    )
    return made


def wish(arguments: argparse.Namespace) -> Wish:
    return Wish(
        source=arguments.source,
        destination=arguments.out,
        format=arguments.format,
        outtype=arguments.outtype,
        base=arguments.base,
        values=arguments.values,
        name=arguments.name,
        license=arguments.license,
        ollama=arguments.ollama,
        tokens=arguments.tokens,
        max_kl=arguments.max_kl,
        accept_loss=arguments.accept_loss,
        accept_differences=arguments.accept_differences,
    )


@contextmanager
def _bar(console: Console) -> Iterator[Told]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading", total=None)
        yield lambda what, done, of: progress.update(task, description=what, completed=done, total=of)


def _lines(out: Path, record: Mapping[str, Any]) -> Iterator[str]:
    for name, size in record["files"].items():
        yield f"{out / name}  {size / 1e6:.1f} MB"
    check = record["check"]
    if check is None:
        yield "not loaded again"
    else:
        yield f"loaded again by {check['by']}; {check['tokens']} tokens of {check['probes']}:"
        yield (
            f"  KL {check['kl']:.5f} nats a token, |Δ log-probability| {check['mean_change']:.4f} on average and "
            f"{check['largest_change']:.4f} at most, the same likeliest token {check['same_first']:.1%}, greedy "
            f"answers the same for {check['same_answers']:.0%}"
        )
    if record["adapter_kept"] is not None:
        yield f"  of what the adapter changed, {record['adapter_kept']:.1%} is left in {record['outtype']}"
    for note in [*record["notes"], *(f"accepted: {what}" for what in record["accepted"].values())]:
        yield f"· {note}"
