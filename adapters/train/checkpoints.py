"""The checkpoints of one run: each appears whole or not at all, and what does not match its hashes is passed over.

It knows nothing of what a checkpoint holds.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters.staging import staged

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoints:
    directory: Path
    limit: int

    def save(self, step: int, identity: Mapping[str, str], write: Callable[[Path], None]) -> Path:
        """`identity`: what must be the same for the run to go on from here."""
        destination = self.directory / f"step-{step:08d}"
        with staged(destination) as staging:
            write(staging)
            files = {path.name: _sha256(path) for path in sorted(staging.iterdir())}
            manifest = {"identity": dict(identity), "files": files}
            (staging / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for old in self._found()[: -self.limit]:
            shutil.rmtree(old)
        return destination

    def newest(self) -> Path | None:
        """The last one that is whole."""
        return next((path for path in reversed(self._found()) if is_whole(path)), None)

    def _found(self) -> list[Path]:
        return sorted(self.directory.glob("step-*"))


def identity_of(checkpoint: Path) -> dict[str, str]:
    return dict(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["identity"])


def is_whole(checkpoint: Path) -> bool:
    """Every file that the manifest names has the hash that it names; the manifest was written last."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all(_sha256(checkpoint / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
