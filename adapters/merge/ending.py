"""How a command of this package ends: what its work raises, said in one line, and the exit code for it."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

from adapters.errors import AdapterError

FAILED, WRONG_WORDS, STOPPED = 1, 2, 130
ExitCodes = tuple[tuple[type[AdapterError], int, str], ...]
"""Error, exit code, and what it means; the first that fits."""


def ended(work: Callable[[], None], codes: ExitCodes, console: Console, stopped: str) -> int:
    """`stopped`: what a Ctrl-C leaves."""
    try:
        work()
    except AdapterError as error:
        console.print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True)
        return next((code for kind, code, _ in codes if isinstance(error, kind)), FAILED)
    except OSError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return FAILED
    except KeyboardInterrupt:
        console.print(f"[bold red]stopped[/]: {stopped}")
        return STOPPED
    return 0
