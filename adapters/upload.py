"""What a client sends, and which of its files we keep. Knows names only; it opens nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any, BinaryIO
from unicodedata import normalize

from adapters.errors import UnsafeArchive, UploadError
from adapters.lineage import Lineage
from adapters.refusals import refuse
from adapters.tags import Tags

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INITIAL = "initial_adapter_model.safetensors"
"""The adapter before training, where its initialisation changed the base (PiSSA and its kin)."""
ORIGINAL = "original_"
"""Before the name of a file that was sent and that a LoRA near it stands in for."""
PROVENANCE = "loraplex.json"
README = "README.md"
HELD_OUT = "held_out.jsonl"
"""Rows that it was not trained on, for measuring what becomes of it: they stay where it was trained."""
TOKENIZER_FILES = frozenset(
    (
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
    )
)
KEPT = frozenset((CONFIG, WEIGHTS, INITIAL, PROVENANCE, README)) | TOKENIZER_FILES
TRAINER_STATE = ("training_args.bin", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*.pth")
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
MAX_PART_BYTES, MAX_PARTS = 255, 64
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class UploadedFile:
    filename: str
    stream: BinaryIO
    """Positioned at its start; archives must be seekable."""


@dataclass(frozen=True)
class UploadLimits:
    max_bytes: int = 2 << 30
    """Of the unpacked files together."""
    max_files: int = 1000
    """Members of an archive, or loose files."""


@dataclass(frozen=True)
class UploadOptions:
    """What is asked for beside the name and the files."""

    description: str | None = None
    promote: bool = True
    """Whether the alias `default` moves to the version."""
    sha256: str | Mapping[str, str] | None = None
    """What the client says it sent, see adapters/checksums.py."""
    max_error: float = 0.0
    """What may be lost of its change of the weights where it becomes a LoRA of the rank that is served."""
    by: str | None = None
    """The id of the API key that uploads."""
    probe: bool = False
    """Whether an engine is there to try it before it may serve."""
    tags: Tags = field(default_factory=dict)
    """Of the version."""
    lineage: Lineage = field(default_factory=dict)
    """Where it comes from, as far as its files do not say it."""
    source: Mapping[str, Any] | None = None
    """Where the files were fetched from; goes into the version's lineage."""


PLAIN = UploadOptions()


def safe_parts(name: str) -> tuple[str, ...]:
    """Path parts of a stranger's file name. Raises UnsafeArchive for what no honest name needs."""
    plain = normalize("NFKC", name)  # wide dots and slashes become what other programs may take them for
    if not name or "\\" in plain or plain.startswith("/") or CONTROL.search(name):
        raise UnsafeArchive(
            f"file name {name[:200]!r} is absolute, empty or has a backslash or control character; use relative names"
        )
    parts = PurePosixPath(plain).parts
    if any(part.strip(" ") == ".." for part in parts) or (parts and parts[0][1:2] == ":"):
        raise UnsafeArchive(f"file name {name[:200]!r} leaves the archive; use names below its root")
    if any(len(part.encode(errors="replace")) > MAX_PART_BYTES for part in parts) or len(parts) > MAX_PARTS:
        raise UnsafeArchive(
            f"file name {name[:200]!r} is longer than any disk takes; use at most {MAX_PARTS} parts of "
            f"{MAX_PART_BYTES} bytes"
        )
    return PurePosixPath(name).parts


def is_kept(parts: tuple[str, ...]) -> bool:
    """Whether this file goes to the store. Raises for a file that must not be ignored silently."""
    name = parts[-1] if parts else ""
    if name in KEPT:
        if len(parts) > 2:
            raise UploadError(
                f"{'/'.join(parts)[:200]!r} lies {len(parts) - 1} directories deep; pack the adapter's files at the "
                "archive's root or in one directory",
                code="nesting",
            )
        return True
    if any(fnmatch(name, pattern) for pattern in (*TRAINER_STATE, f"{ORIGINAL}*")):
        return False
    if name.lower().endswith(PICKLES):
        raise refuse("pickle", f"the upload contains {name[:200]!r}; expected {WEIGHTS}")
    if name.lower().endswith(".safetensors"):
        raise refuse("extra_weights", f"the upload contains {name[:200]!r} beside or instead of {WEIGHTS}")
    return False
