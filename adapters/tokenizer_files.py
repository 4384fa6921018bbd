"""Tokenizer and chat-template files that came with an adapter, against the base's: only the base's are served.

Compares files as JSON; it loads no tokenizer.
"""

from __future__ import annotations

import filecmp
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters import json_document
from adapters.json_bounds import values_of
from adapters.json_document import read_document
from adapters.names import NUMBER
from adapters.refusals import refuse
from adapters.upload import TOKENIZER_FILES

VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "added_tokens.json", "tokenizer_config.json")
WHOLE_VOCABULARIES = VOCABULARY_FILES[:2]
"""The base's tokens are known when it has one of these; otherwise only their number is."""
MOST_TIMES = 4
"""How often larger than the base's own an adapter's tokenizer files may be: other releases write the same one longer.
Read into objects, a file takes many times its size."""


@dataclass(frozen=True)
class Bounds:
    max_bytes: int
    max_values: int


UNBOUNDED = Bounds(1 << 40, 1 << 40)
"""For the base's own files."""
WITHOUT_A_BASE = Bounds(64 << 20, 1 << 22)
"""Where the base has no tokenizer in JSON to compare with."""


def check_tokenizer(staged: Path, base: Path) -> list[str]:
    """Warnings for a person. Raises InvalidAdapter when tokens were added or renumbered."""
    differing = [name for name in sorted(TOKENIZER_FILES) if (staged / name).exists() and not _same(staged, base, name)]
    added = _vocabulary(staged, [name for name in differing if name in VOCABULARY_FILES], _strangers_bounds(base))
    if added:
        whole = any((base / name).is_file() for name in WHOLE_VOCABULARIES)
        known = _vocabulary(base, VOCABULARY_FILES, UNBOUNDED) if whole else {}
        _require_known(added, known, _vocabulary_size(base))
    if not differing:
        return []
    return [f"{', '.join(differing)} are kept but not used: the base's own tokenizer and chat template are served"]


def chat_template_sha256(base: Path) -> str | None:
    """Of the base's template text; none when it has no template that can be found without loading it."""
    if (base / "chat_template.jinja").is_file():
        return hashlib.sha256((base / "chat_template.jinja").read_bytes()).hexdigest()
    template = _read(base / "tokenizer_config.json", UNBOUNDED).get("chat_template")
    return hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None


def _strangers_bounds(base: Path) -> Bounds:
    contents = [(base / name).read_bytes() for name in VOCABULARY_FILES if (base / name).is_file()]
    if not contents:
        return WITHOUT_A_BASE
    return Bounds(
        json_document.MAX_BYTES + MOST_TIMES * max(map(len, contents)),
        json_document.MAX_VALUES + MOST_TIMES * max(map(values_of, contents)),
    )


def _same(staged: Path, base: Path, name: str) -> bool:
    return (base / name).is_file() and filecmp.cmp(staged / name, base / name, shallow=False)


def _require_known(tokens: Mapping[str, int], known: Mapping[str, int], size: int | None) -> None:
    for token, number in tokens.items():
        if (known and token not in known) or (not known and size is not None and number >= size):
            raise refuse("adds_tokens", f"token {token[:80]!r} ({number}) is not in the base's vocabulary")
        if known and known[token] != number:
            raise refuse("other_tokenizer", f"token {token[:80]!r} is {number}, in the base {known[token]}")


def _vocabulary(directory: Path, names: Iterable[str], bounds: Bounds) -> dict[str, int]:
    tokens: dict[str, int] = {}
    for name in names:
        tokens.update(_tokens_of(name, _read(directory / name, bounds)))
    return tokens


def _tokens_of(name: str, content: Mapping[str, Any]) -> dict[str, int]:
    if name == "tokenizer.json":
        return _tokens_of_model(content)
    if name == "tokenizer_config.json":
        entries = content.get("added_tokens_decoder")
        items = entries.items() if isinstance(entries, dict) else ()
        return {
            str(item["content"]): int(number) for number, item in items if _is_token(item) and NUMBER.fullmatch(number)
        }
    return {token: number for token, number in content.items() if type(number) is int}


def _tokens_of_model(content: Mapping[str, Any]) -> dict[str, int]:
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    tokens: dict[str, int] = {}
    if isinstance(vocabulary, dict):
        tokens = {token: number for token, number in vocabulary.items() if type(number) is int}
    elif isinstance(vocabulary, list):  # unigram: [token, score] in the order of their numbers
        tokens = {str(item[0]): number for number, item in enumerate(vocabulary) if isinstance(item, list) and item}
    items = added if isinstance(added, list) else ()
    tokens.update(
        {str(item["content"]): item["id"] for item in items if _is_token(item) and type(item.get("id")) is int}
    )
    return tokens


def _is_token(item: object) -> bool:
    return isinstance(item, dict) and isinstance(item.get("content"), str)


def _vocabulary_size(base: Path) -> int | None:
    size = _read(base / "config.json", UNBOUNDED).get("vocab_size")
    return size if isinstance(size, int) else None


def _read(path: Path, bounds: Bounds) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return read_document(path, max_bytes=bounds.max_bytes, max_values=bounds.max_values)
