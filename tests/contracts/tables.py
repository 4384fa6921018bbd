"""The tables of the README that repeat the code, made from the code. `python -m tests.contracts.tables` writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from adapters import errors as artifact
from adapters.refusals import REFUSALS
from server import errors, problems
from server.settings import Settings

README = Path(__file__).parents[2] / "README.md"
DRAWN = re.compile(r"[│├└─ ]*(\w+) {2,}(.+)")


def settings() -> Iterator[str]:
    yield from _table("Setting", "Default", "Meaning")
    for name, field in Settings.model_fields.items():
        choices = f" One of {_words(get_args(field.annotation))}." if get_origin(field.annotation) is Literal else ""
        yield _row(f"`{name}`", _default(field.default), " ".join((field.description or "").split()) + choices)


def error_classes() -> Iterator[str]:
    yield from _table("Status", "Code", "Class", "When")
    for error, status in sorted(problems.STATUS.items(), key=lambda found: found[1]):
        yield _row(str(status), f"`{vars(error)['code']}`", f"`{error.__name__}`", _drawn(error))


def refusals() -> Iterator[str]:
    yield from _table("Code", "What to do")
    yield from (_row(f"`{code}`", advice) for code, advice in REFUSALS.items())


SECTIONS = {"settings": settings, "errors": error_classes, "refusals": refusals}


def rendered(readme: str) -> str:
    """The README with every section between `<!-- name -->` and `<!-- /name -->` made anew."""
    for name, lines in SECTIONS.items():
        opened, closed = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = readme.partition(opened)
        readme = before + opened + "\n".join(lines()) + "\n" + closed + rest.partition(closed)[2]
    return readme


def _drawn(error: type[Exception]) -> str:
    """What the tree in the module's docstring says of a class; a root has no words of its own."""
    module = artifact if issubclass(error, artifact.AdapterError) else errors
    lines = [DRAWN.fullmatch(line) for line in (module.__doc__ or "").splitlines()]
    return next((line[2] for line in lines if line and line[1] == error.__name__), "anything else in this tree")


def _default(value: Any) -> str:
    if isinstance(value, tuple):
        return _words(value)
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _words(choices: Iterable[object]) -> str:
    return ", ".join(f"`{choice}`" for choice in choices)


def _table(*headings: str) -> Iterator[str]:
    yield _row(*headings)
    yield "|" + "---|" * len(headings)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
