"""`loraplex train VERB` (`python -m adapters.train`): parses the words, runs the verb, turns errors into exit codes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from types import ModuleType

from rich.console import Console
from rich.markup import escape

from adapters.errors import AdapterError, ConfigError, DataError, Diverged, NotServable, RunStopped, WouldNotFit
from adapters.train.verbs import check, estimate, evaluate, init, inspect, resume, run, sweep

VERBS: Mapping[str, ModuleType] = {
    "init": init,
    "check": check,
    "estimate": estimate,
    "run": run,
    "resume": resume,
    "eval": evaluate,
    "inspect": inspect,
    "sweep": sweep,
}
EXIT_CODES: tuple[tuple[type[AdapterError], int, str], ...] = (
    (ConfigError, 2, "configuration or command line"),
    (DataError, 3, "data"),
    (WouldNotFit, 4, "would not fit in memory"),
    (Diverged, 5, "training diverged"),
    (NotServable, 6, "trained, but not servable"),
    (RunStopped, 7, "stopped by SIGTERM or Ctrl-C, with a checkpoint to go on from"),
)
FAILED, STOPPED = 1, 130
EPILOG = "Exit codes: 0 done, 1 failed, {}, 130 stopped at once."


def main(argv: Sequence[str]) -> int:
    # Beside a busy neighbour (an engine, a second run) threads that spin while they wait made a step of 2 s take
    # 40 to 90 s; threads that sleep make it 6 s, and alone 2.3 s. OpenMP reads this when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = parser().parse_args(argv)
    console = Console(stderr=True)
    try:
        VERBS[arguments.verb].execute(arguments, console)
    except AdapterError as error:
        console.print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True)
        return next((code for kind, code, _ in EXIT_CODES if isinstance(error, kind)), FAILED)
    except KeyboardInterrupt:
        console.print("[bold red]stopped[/]: nothing was written")
        return STOPPED
    return 0


def parser() -> argparse.ArgumentParser:
    codes = ", ".join(f"{code} {meaning}" for _, code, meaning in EXIT_CODES)
    parser = argparse.ArgumentParser(
        prog="loraplex train", description="Make a LoRA adapter and prove it.", epilog=EPILOG.format(codes)
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        verb.add_arguments(verbs.add_parser(name, help=verb.HELP, description=verb.__doc__))
    return parser
