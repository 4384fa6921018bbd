"""An adapter's directory, as a merge reads it: which two files, whose digest, of which base."""

from __future__ import annotations

from pathlib import Path

from adapters.base import BaseModel
from adapters.checksums import sha256_of
from adapters.provenance import read_provenance
from adapters.refusals import refuse
from adapters.store import digest_of
from adapters.upload import CONFIG, KEPT, ORIGINAL, PROVENANCE, WEIGHTS


def prefix_of(adapter: Path) -> str:
    """Of the two files to read: what was sent stands beside a LoRA that is only near it. Raises InvalidAdapter."""
    if all((adapter / f"{ORIGINAL}{name}").is_file() for name in (CONFIG, WEIGHTS)):
        return ORIGINAL
    missing = [name for name in (CONFIG, WEIGHTS) if not (adapter / name).is_file()]
    if missing:
        raise refuse("missing_file", f"{adapter} has no {' and no '.join(missing)}")
    return ""


def digest_of_adapter(adapter: Path) -> str:
    """The one that a store gives it: over what it keeps."""
    files = sorted(path for path in adapter.iterdir() if path.is_file())
    kept = (path for path in files if path.name in KEPT or path.name.startswith(ORIGINAL))
    return digest_of({path.name: sha256_of(path) for path in kept})


def require_same_base(adapter: Path, base: BaseModel) -> list[str]:
    """Notes for a person. Raises InvalidAdapter for an adapter that says it is of another base."""
    trained_on = read_provenance(adapter / PROVENANCE).base_fingerprint
    if trained_on is None:
        return [f"no {PROVENANCE} says which base it was trained on: only names and shapes were compared"]
    if trained_on != base.fingerprint:
        raise refuse("wrong_base", f"trained on the base {trained_on[:80]}, given is {base.name} {base.fingerprint}")
    return []
