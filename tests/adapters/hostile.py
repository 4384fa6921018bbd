"""Uploads from people who mean harm, by family: every one of them must be refused, and leave nothing.

A family is a function that yields cases; `@family` says with which codes they may be refused. The families lie in
hostile_tars, hostile_zips, hostile_weights and hostile_documents; `names` finds them all.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters.upload import UploadedFile, UploadLimits
from tests.adapters.factories import AdapterFiles

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LIMITS = UploadLimits(max_bytes=8 << 20, max_files=200)
"""Which the bombs exceed. The room above a real adapter is what they have to fill memory or disk."""
CANARY = Path("/tmp/loraplex-canary")
"""What code from a pickle, a link or a traversal would make."""

Files = Mapping[str, bytes]
Sent = list[tuple[str, bytes]]
"""File names and contents, as a client sends them."""
Cases = Iterator[tuple[str, Files | Sent]]
Family = Callable[[], Cases]


@dataclass(frozen=True)
class Hostile:
    family: str
    label: str
    sent: Sent
    codes: frozenset[str]
    """One of which is the reason."""

    def __str__(self) -> str:
        return f"{self.family}: {self.label}"

    def uploads(self) -> list[UploadedFile]:
        return [UploadedFile(name, io.BytesIO(content)) for name, content in self.sent]


FAMILIES: dict[str, tuple[Family, frozenset[str]]] = {}


def family(*codes: str) -> Callable[[Family], Family]:
    def register(function: Family) -> Family:
        assert function.__name__ not in FAMILIES, function.__name__
        FAMILIES[function.__name__] = (function, frozenset(codes))
        return function

    return register


def names() -> list[str]:
    """Of all families."""
    from tests.adapters import hostile_documents, hostile_tars, hostile_weights, hostile_zips

    assert all((hostile_documents, hostile_tars, hostile_weights, hostile_zips))
    return list(FAMILIES)


def of_family(name: str) -> Iterator[Hostile]:
    cases, codes = FAMILIES[name]
    for label, files in cases():
        sent = list(files.items()) if isinstance(files, Mapping) else files
        yield Hostile(name, label, sent, codes)


def every() -> Iterator[Hostile]:
    for name in names():
        yield from of_family(name)


def good() -> dict[str, bytes]:
    """An adapter that is accepted, for one of its parts to be spoiled."""
    return AdapterFiles().files()


def archive(name: str, content: bytes) -> Sent:
    return [(name, content)]


TRAVERSALS = (
    "../adapter_config.json", "../../../../tmp/loraplex-canary", "a/../../README.md", "a/..", "..", "./../README.md",
    "/tmp/loraplex-canary", "//server/share/README.md", "..\\README.md", "a\\..\\..\\README.md", "\\\\server\\x",
    "C:\\README.md", "C:/README.md", "c:README.md", "．．/README.md", "‥/README.md", "․․/README.md", "／tmp/x",
    "a＼README.md", ".. /README.md", " ../README.md", "a\nREADME.md", "a\rREADME.md", "\x1b[2JREADME.md", "a\x7f",
    "x" * 256, "é" * 128, "a/" * 64 + "README.md",
)  # fmt: skip
"""Names that lead out of an archive, or would in another program or on another system."""
