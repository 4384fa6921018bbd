"""Whether registry and files of a place agree, told with plain SQL and hashes, without the product's own code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import fsspec
from sqlalchemy import create_engine, text

from tests.adapters.operations import Place


def require_sound(place: Place) -> None:
    """Every version has its files, whole; every file belongs to a version; every alias points to one; no leftovers."""
    url = place.database or f"sqlite:///{place.root}/registry.db"
    engine = create_engine(url)
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT adapter, number, digest, state FROM adapter_versions")).all()
        targets = connection.execute(text("SELECT adapter, alias, number FROM adapter_alias_targets")).all()
        named = connection.execute(text("SELECT name, last_number FROM adapters WHERE removed_at IS NULL")).all()
        if url.startswith("sqlite"):
            assert connection.execute(text("PRAGMA integrity_check")).scalar() == "ok"
            assert connection.execute(text("PRAGMA foreign_key_check")).all() == []
    engine.dispose()
    digests = {row.digest for row in rows}
    assert {row.state for row in rows} <= {"ready"}, rows
    assert {(row.adapter, row.number) for row in targets} <= {(row.adapter, row.number) for row in rows}
    assert {row.name for row in named} == {row.adapter for row in rows}
    for row in named:
        assert row.last_number >= max(each.number for each in rows if each.adapter == row.name)
    local = {path.name: _hashes(path) for path in (place.root / place.store / "blobs").iterdir()}
    for name, files in local.items():
        assert _digest(files) == f"sha256:{name}", (name, files)
    assert list((place.root / place.store / "staging").iterdir()) == []
    if place.bucket is None:
        assert {f"sha256:{name}" for name in local} == digests
    else:
        assert {f"sha256:{name}" for name in local} <= digests
        _require_bucket(place.bucket, digests)


def _require_bucket(url: str, digests: set[str]) -> None:
    bucket, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    blobs: dict[str, dict[str, str]] = {}
    others = set()
    for path in bucket.find(root):
        _, _, rest = path.partition(f"{root}/")
        place, _, name = rest.partition("/")
        if place == "blobs":
            blob, _, file = name.partition("/")
            blobs.setdefault(blob, {})[file] = hashlib.sha256(bucket.cat_file(path)).hexdigest()
        else:
            others.add(rest)
    assert {_digest(files) for files in blobs.values()} == digests == {f"sha256:{name}" for name in blobs}
    assert others == {"registry", *(f"whole/{name}" for name in blobs)}


def _hashes(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def _digest(files: Mapping[str, str]) -> str:
    listing = json.dumps(sorted(files.items()), separators=(",", ":"))
    return f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}"
