"""A source as a publisher writes it, and which sources a server may read. Opens nothing.

hf://org/name@revision/folder · s3://bucket/folder · https://host/adapter.tar.gz · file:///directory
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from adapters.errors import SourceError, SourceRefused

ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://(.+)")
MAX_CHARACTERS = 2000
FILE, HUB = "file", "hf"
WEB = ("http", "https")
WRAPPERS = frozenset(
    (
        *("local", "memory", "data", "dir", "reference", "generic", "root"),
        *("simplecache", "filecache", "blockcache", "cached", "asyncwrapper"),
        *("zip", "tar", "libarchive", "git", "dvc", "dask", "asynclocal"),
    )
)
"""Protocols of fsspec that read this machine, or another source by a way around these rules."""


@dataclass(frozen=True)
class Source:
    protocol: str
    rest: str
    """What stands behind `://`."""

    @property
    def text(self) -> str:
        return f"{self.protocol}://{self.rest}"

    @property
    def shown(self) -> str:
        """For people, logs and lineage: a query may hold a signature, which is as good as a password."""
        return shown(self.text)

    @property
    def last_part(self) -> str:
        """The file name, where it is one."""
        return unquote(self.rest.partition("?")[0].rstrip("/").rpartition("/")[2])


@dataclass(frozen=True)
class Policy:
    """What a server may read on a publisher's word."""

    protocols: Collection[str] = ()
    """Open as a whole; of the web, public addresses only."""
    roots: tuple[str, ...] = ()
    """Directories of this machine, and URLs that are open with all that lies below them."""

    def directories(self) -> list[Path]:
        return [Path(root) for root in self.roots if "://" not in root]

    def is_below_a_root(self, source: Source) -> bool:
        """Whether the operator named this very place."""
        urls = [root.rstrip("/") for root in self.roots if "://" in root]
        return any(source.text == url or source.text.startswith(f"{url}/") for url in urls)

    def require(self, source: Source) -> None:
        """Raises SourceRefused. A file is looked at more closely when it is opened (local.py), a host in web.py."""
        if source.protocol == FILE:
            allowed = bool(self.directories())
        else:
            allowed = source.protocol in self.protocols or self.is_below_a_root(source)
        if not allowed:
            opened = ", ".join(f"{protocol}://" for protocol in sorted(self.protocols)) or "no protocol"
            raise SourceRefused(
                f"this server does not read {source.protocol}:// there; it is open for {opened} and "
                f"{len(self.roots)} named places. Use one of them, or ask its operator to change source_protocols or "
                "source_roots"
            )


def parse(text: str) -> Source:
    """Raises SourceError, whose message never repeats a password."""
    match = ADDRESS.fullmatch(text) if len(text) <= MAX_CHARACTERS and _is_plain(text) else None
    if match is None:
        raise SourceError(
            f"source {shown(text)[:200]!r} is not an address; expected hf://org/name@revision, s3://bucket/folder, "
            f"https://host/adapter.tar.gz or another PROTOCOL://PLACE of at most {MAX_CHARACTERS} characters, "
            "not chained and without spaces"
        )
    source = Source(match[1], match[2])
    if source.protocol in WRAPPERS or (source.protocol not in WEB and "::" in source.rest):
        raise SourceError(f"source {source.shown[:200]!r} wraps another one or has no place of its own; name the place")
    if source.protocol != HUB and "@" in source.rest.partition("/")[0]:
        raise SourceError(
            "the source holds a user name or a password, which would be stored with the job; leave it out and give the "
            "server its credentials"
        )
    if {".", ".."} & set(unquote(source.rest.partition("?")[0]).split("/")):
        raise SourceError(f"source {source.shown[:200]!r} has . or .. in its path; write the path that is meant")
    return source


def check_protocol(name: str) -> str:
    """A value of the setting `source_protocols`. Raises ValueError."""
    if name in WRAPPERS or name == FILE or re.fullmatch(r"[a-z][a-z0-9+.-]*", name) is None:
        raise ValueError(
            f"{name!r} cannot be opened as a whole: it reads this machine, wraps another source or is no protocol; "
            "name directories and URLs in source_roots"
        )
    return name


def check_root(root: str) -> str:
    """A value of the setting `source_roots`. Raises ValueError."""
    if "://" not in root:
        if not Path(root).is_absolute():
            raise ValueError(f"{root!r} is neither an absolute directory nor a URL")
        return root
    try:
        source = parse(root)
    except SourceError as error:
        raise ValueError(error.message) from None
    if source.protocol == FILE:
        raise ValueError(f"{root!r}: give the directory itself, without file://")
    return root


def shown(text: str) -> str:
    """Without what may be a secret: user and password, query and fragment."""
    hidden = re.sub(r"://[^/@\s]*:[^/@\s]*@", "://…@", text)
    return re.sub(r"[?#]\S*", "?…", hidden)


def _is_plain(text: str) -> bool:
    if not text.isprintable() or "\\" in text or any(character.isspace() for character in text):
        return False
    try:
        urlsplit(text)
    except ValueError:
        return False
    return True
