"""Files of data → conversations with their places: JSONL, or one JSON array in a `.json` file.

It knows nothing of tokenizers. Every row is read before anything is said, so that one look shows all that is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import DataError
from adapters.train.data import Conversation
from adapters.train.formats import FORMATS, read_row, recognise
from adapters.train.sections import DataFile, TrainFile

SHOWN = 10
"""Wrong rows that one error lists."""


@dataclass(frozen=True)
class Reading:
    conversations: tuple[Conversation, ...]
    skipped: tuple[str, ...] = ()
    """What was wrong with each row that was left out."""


def read_files(files: Sequence[DataFile], *, max_skipped: int = 0, empty_answers: bool = False) -> Reading:
    """Up to `max_skipped` wrong rows are left out; one more, and all of them are an error."""
    found: list[Conversation] = []
    wrong: list[str] = []
    for file in files:
        for row in _read_file(file, empty_answers):
            if isinstance(row, DataError):
                wrong.append(row.message)
            else:
                found.append(row)
    if len(wrong) > max_skipped:
        more = f"\n… and {len(wrong) - SHOWN} rows more" if len(wrong) > SHOWN else ""
        cap = f"{len(wrong)} wrong rows, more than data.max_skipped={max_skipped}:\n" if max_skipped else ""
        raise DataError(cap + "\n".join(wrong[:SHOWN]) + more)
    if not found:
        names = ", ".join(str(file.path) for file in files)
        raise DataError(f"{names}: no conversation found; one JSON object a line is expected")
    return Reading(tuple(found), tuple(wrong))


def _read_file(file: DataFile, empty_answers: bool) -> Iterator[Conversation | DataError]:
    """The first row decides the format of a file that does not say it."""
    shape = FORMATS.get(file.format)
    weight = file.weight if isinstance(file, TrainFile) else 1.0
    for place, row in _rows(file.path):
        if isinstance(row, DataError):
            yield row
            continue
        try:
            shape = shape or recognise(row, place)
            yield Conversation(read_row(row, shape, place, empty_answers=empty_answers), place, weight)
        except DataError as error:
            yield error


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, the JSON value or the error that there is in its stead). Only a newline ends a line of JSONL."""
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if path.suffix == ".json" and content.lstrip().startswith(b"["):
        yield from _array(content, path)
        return
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield place, _line(line, place)


def _line(line: bytes, place: str) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return DataError(f"{place}: not UTF-8 text: byte {error.start + 1} of the line is 0x{line[error.start]:02x}")
    except json.JSONDecodeError as error:
        return DataError(f"{place}: not valid JSON: {error.msg} at column {error.colno}; one JSON object a line")
    except (RecursionError, ValueError):  # ValueError: Python reads no number of more than 4,300 digits
        return DataError(f"{place}: nested too deeply, or a number too long, to be a conversation")


def _array(content: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    """Element by element, for the line on which each begins; a broken array has no element after the break."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text: 0x{content[error.start]:02x}") from None
    decoder, at, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
    while (at := _skip(text, at)) < len(text) and text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            where = line + text.count("\n", counted, getattr(error, "pos", at))
            raise DataError(
                f"{path}:{where}: not valid JSON: {getattr(error, 'msg', 'nested too deeply, or a number too long')}"
            ) from None
        yield f"{path}:{line}", value
        at = _skip(text, at)
        if at < len(text) and text[at] == ",":
            at += 1
        elif at >= len(text) or text[at] != "]":
            line += text.count("\n", counted, at)
            raise DataError(f"{path}:{line}: expected a comma or ] after a row of the array")
    if at >= len(text):
        raise DataError(f"{path}:{line}: the array is not closed after this row; the file may have been cut off")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
