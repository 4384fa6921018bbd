"""`loraplex fidelity`: what a merge of this adapter would keep of it, measured, with nothing written but the report."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from adapters.base import BaseModel
from adapters.merge import fidelity_flags
from adapters.merge.bases import ASKED, for_nf4
from adapters.merge.cli import EXIT_CODES
from adapters.merge.ending import ended
from adapters.merge.plan import DTYPES, MergePlan, plan_merge
from adapters.merge.report_table import show
from adapters.merge.verify import PICTURE, measured, require

PACKED = ("q8_0", "nf4")
"""What a merge only becomes when it is exported."""
EPILOG = "Exit codes: 0 within the budget, 1 failed, 2 command line, {}, 130 stopped."


def main(argv: Sequence[str]) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in adapters/train/cli.py
    arguments = parser().parse_args(argv)
    console = Console(stderr=True)
    return ended(lambda: execute(arguments, console), EXIT_CODES, console, "nothing was written")


def parser() -> argparse.ArgumentParser:
    codes = ", ".join(f"{code} {meaning}" for _, code, meaning in sorted(EXIT_CODES, key=lambda each: each[1]))
    made = argparse.ArgumentParser(
        prog="loraplex fidelity",
        description="What a merge of this adapter would keep of it: KL, losses, and its change of the weights.",
        epilog=EPILOG.format(codes),
    )
    made.add_argument("adapter", type=Path, metavar="ADAPTER_DIR")
    made.add_argument("--base", type=Path, required=True, metavar="MODEL_DIR", help="the base it was trained on")
    made.add_argument("--merged", type=Path, metavar="DIR", help="a finished merge of it, whose files are judged")
    made.add_argument(
        "--from", dest="values", choices=ASKED, default="auto", help="the base's values that are judged (default: auto)"
    )
    made.add_argument(
        "--dtype",
        choices=(*DTYPES, *PACKED),
        default="bfloat16",
        help="of the merge, or what an export makes of it; nf4 is judged from the original values (default: bfloat16)",
    )
    made.add_argument("--json", action="store_true", help="print the whole report as JSON")
    made.add_argument(
        "--png", type=Path, metavar="FILE", help=f"the picture; default: ADAPTER_DIR-{PICTURE}, beside the directory"
    )
    fidelity_flags.add_arguments(made.add_argument_group("what is measured, and what may be lost"))
    return made


def execute(arguments: argparse.Namespace, console: Console) -> None:
    plan = _plan(arguments)
    console.print(f"· {plan.choice.values} values of the base: {escape(plan.choice.reason)}", soft_wrap=True)
    wishes = replace(fidelity_flags.wishes(arguments), stored=arguments.dtype)
    with fidelity_flags.bar(console) as progress:
        report = measured(plan, wishes, fidelity_flags.told_by(progress), arguments.merged)
    if arguments.json:
        Console().print_json(json.dumps(report.to_json()), indent=None)
    else:
        show(report, report.within(wishes.budget), Console())
    from adapters.merge.report_chart import draw

    picture = arguments.png or arguments.adapter.with_name(f"{arguments.adapter.resolve().name}-{PICTURE}")
    draw(report, picture)
    console.print(f"drawn in {escape(str(picture))}", soft_wrap=True)
    require(report, wishes)


def _plan(arguments: argparse.Namespace) -> MergePlan:
    base = BaseModel.read(arguments.base)
    values = for_nf4(base, arguments.values) if arguments.dtype == "nf4" else arguments.values
    return plan_merge(arguments.adapter, base, values, "float32" if arguments.dtype in PACKED else arguments.dtype)
