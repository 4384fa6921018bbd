"""`loraplex merge` (`python -m adapters.merge`): the words, the plan as a table, the bar; errors into exit codes."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from adapters.base import BaseModel
from adapters.errors import Conflict, DataError, InvalidAdapter, MergeError, NotMergeable, Unfaithful
from adapters.merge import fidelity_flags
from adapters.merge.apply import write_merged
from adapters.merge.bases import ASKED
from adapters.merge.combine import METHODS, SPARSE, Recipe, SignMethod
from adapters.merge.compose import Composition, compose
from adapters.merge.ending import ExitCodes, ended
from adapters.merge.plan import DTYPES, MergePlan, plan_merge
from adapters.merge.report import FidelityReport
from adapters.merge.report_table import show
from adapters.merge.unfinished import KEPT_DAYS, place_of
from adapters.merge.verify import FILE, PICTURE, check_of
from adapters.train.allocator import map_large_tensors

EXIT_CODES: ExitCodes = (
    (InvalidAdapter, 3, "an adapter is not what it should be, or of another base"),
    (NotMergeable, 4, "the adapter has no place in this base's weights"),
    (Unfaithful, 7, "the merge is further from the adapter than the budget allows"),
    (MergeError, 5, "the merge cannot be done as asked"),
    (Conflict, 6, "something else is in the way"),
    (DataError, 8, "the data to measure on cannot be read"),
)
EPILOG = "Exit codes: 0 done, 1 failed, 2 command line, {}, 130 stopped at once; a later call goes on from there."
MAX_RANK = 16
"""What `loraplex serve` takes unless it is told otherwise."""
DENSE_RANK = 128
"""Of what is combined on ΔW on its way into the base; the other methods have a rank of their own, and keep it."""


def main(argv: Sequence[str]) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in adapters/train/cli.py
    arguments = parse(argv)
    map_large_tensors()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # an optional kernel is missing: no matter
    console = Console(stderr=True)
    went_on = "the same command goes on with the shards that are done"
    return ended(lambda: execute(arguments, console), EXIT_CODES, console, went_on)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Ends the process with exit code 2 for words that make no sense."""
    parsing = parser()
    arguments = parsing.parse_args(argv)
    _require_words(parsing, arguments)
    return arguments


def parser() -> argparse.ArgumentParser:
    codes = ", ".join(f"{code} {meaning}" for _, code, meaning in sorted(EXIT_CODES, key=lambda each: each[1]))
    made = argparse.ArgumentParser(
        prog="loraplex merge",
        description="Put adapters into their base: one model that needs no adapter.",
        epilog=EPILOG.format(codes),
    )
    made.add_argument("adapters", type=Path, nargs="+", metavar="ADAPTER_DIR", help="several are combined first")
    made.add_argument("--base", type=Path, required=True, metavar="MODEL_DIR", help="the base they were trained on")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="becomes a Hugging Face directory")
    made.add_argument(
        "--from",
        dest="values",
        choices=ASKED,
        default="auto",
        help="the base's values: as NF4 leaves them, in 16 bits, or what the adapter was trained on (default)",
    )
    made.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the result (default: bfloat16)")
    made.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    checked = made.add_argument_group("what is measured before it appears, and what it may lose")
    checked.add_argument("--no-verify", action="store_true", help="measure nothing: no model is run")
    fidelity_flags.add_arguments(checked)
    several = made.add_argument_group("several adapters")
    several.add_argument("--method", choices=METHODS, default="svd", help="as PEFT names them (default: svd)")
    several.add_argument("--weights", type=float, nargs="+", metavar="W", help="one for each (default: equal, sum 1)")
    several.add_argument("--density", type=float, metavar="SHARE", help=f"of values kept, for {', '.join(SPARSE)}")
    several.add_argument("--majority-sign", choices=get_args(SignMethod), default="total", help="for ties")
    several.add_argument("--seed", type=int, default=0, help="of what dare drops (default: 0)")
    several.add_argument("--rank", type=int, metavar="R", help=f"with --as-adapter, at most (default: {MAX_RANK})")
    several.add_argument("--as-adapter", action="store_true", help="DIR becomes a plain LoRA; the base stays as it is")
    return made


def _require_words(parsing: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    count = len(arguments.adapters)
    if arguments.weights is not None and len(arguments.weights) != count:
        parsing.error(f"{count} adapters and {len(arguments.weights)} weights; give one for each")
    if count == 1 and (arguments.weights is not None or arguments.as_adapter or arguments.density is not None):
        parsing.error("--weights, --density and --as-adapter are for several adapters")
    if arguments.rank is not None and not arguments.as_adapter:
        parsing.error("--rank is for --as-adapter: a merge has room for any rank")


def execute(arguments: argparse.Namespace, console: Console) -> None:
    base = BaseModel.read(arguments.base)
    if len(arguments.adapters) == 1:
        merge(arguments.adapters[0], base, arguments, console)
        return
    with TemporaryDirectory() as scratch:
        kept = arguments.as_adapter and not arguments.dry_run
        together = Path(scratch) / "+".join(path.resolve().name for path in arguments.adapters)
        made = _compose(arguments, base, arguments.out if kept else together, console)
        console.print(f"combined: {_in_words(made)}", soft_wrap=True)
        if not arguments.as_adapter:
            merge(together, base, arguments, console)


def merge(adapter: Path, base: BaseModel, arguments: argparse.Namespace, console: Console) -> None:
    plan = plan_merge(adapter, base, arguments.values, arguments.dtype)
    Console().print(table(plan))
    for note in (f"{plan.choice.values} values of the base: {plan.choice.reason}", *plan.notes):
        console.print(f"· {escape(note)}", soft_wrap=True)
    if arguments.dry_run:
        return
    reports: list[FidelityReport] = []
    try:
        with fidelity_flags.bar(console) as progress:
            _write(plan, arguments, progress, reports)
    except Unfaithful as refused:
        raise Unfaithful(f"{refused.message}. {_kept(arguments.out)}") from None
    finally:
        for report in reports:  # also of a merge that is refused for it
            show(report, report.within(fidelity_flags.wishes(arguments).budget), Console())
    console.print(f"{escape(str(arguments.out))}: {plan.size_bytes / 1e6:.1f} MB of weights", soft_wrap=True)


def _write(plan: MergePlan, arguments: argparse.Namespace, progress: Progress, reports: list[FidelityReport]) -> None:
    task, check = progress.add_task("merging", total=plan.size_bytes), None
    if not arguments.no_verify:
        check = check_of(plan, fidelity_flags.wishes(arguments), fidelity_flags.told_by(progress), reports.append)
    write_merged(plan, arguments.out, lambda name, size: progress.advance(task, size), check)


def _kept(out: Path) -> str:
    place = place_of(out.absolute())
    return (
        f"Its report is {place / FILE}, drawn in {PICTURE} there. The merged files wait beside it: the same command "
        f"with --accept-loss makes them {out}, and neither merges nor measures again. They go with the first merge "
        f"into this folder after {KEPT_DAYS} days, or with another one into {out.name}"
    )


def table(plan: MergePlan) -> Table:
    """A line for each kind of tensor and what happens to it, layers counted."""
    shown = Table("tensors", "of them", "shape", "what happens", "why", title=f"{plan.base.name} + {plan.adapter.name}")
    rows: dict[tuple[str, ...], int] = {}
    for each in plan.planned:
        name = ".".join("*" if part.isdigit() else part for part in each.name.split("."))
        operation = each.operation
        what = operation.kind if operation else "from NF4" if each.decoded else "as it is"
        key = (name, "×".join(map(str, each.shape)), what, operation.why if operation else "")
        rows[key] = rows.get(key, 0) + 1
    for (name, shape, what, why), count in rows.items():
        shown.add_row(escape(name), f"× {count}", shape, what, escape(why))
    shown.caption = f"{len(plan.shards)} files, {plan.size_bytes / 1e6:.1f} MB, {plan.dtype}"
    return shown


def _compose(arguments: argparse.Namespace, base: BaseModel, destination: Path, console: Console) -> Composition:
    count = len(arguments.adapters)
    merged_rank = DENSE_RANK if arguments.method.endswith("_svd") else None
    recipe = Recipe(
        method=arguments.method,
        weights=tuple(arguments.weights or [1 / count] * count),
        density=arguments.density,
        majority_sign_method=arguments.majority_sign,
        seed=arguments.seed,
        rank=(arguments.rank or MAX_RANK) if arguments.as_adapter else merged_rank,
    )
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("combining", total=None)
        return compose(
            arguments.adapters,
            base,
            recipe,
            destination,
            lambda done, of: progress.update(task, completed=done, total=of),
        )


def _in_words(made: Composition) -> str:
    smallest, largest = made.ranks
    ranks = f"rank {largest}" if smallest == largest else f"ranks {smallest} to {largest}"
    return (
        f"a LoRA of {made.manifest.module_count} modules, {ranks}; the limit of the rank left out {made.error:.2%} of "
        f"it, and it is {made.far:.2%} away from the plain sum"
    )
