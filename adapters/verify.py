"""FLOW verify: hash every blob again → compare with the registry → report, and put right what can be.

It restores nothing that is lost. A version whose files are gone or damaged is marked `failed`, so that it is not
served, and ready again when they are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from adapters.errors import NotFound
from adapters.records import DRAINING, FAILED, READY, Version
from adapters.registry import Registry
from adapters.removal import agreeing
from adapters.store import Store, digest_of

BROKEN = "its files are "
"""How the reason begins that this gives: a version that failed for another reason is left alone."""
LOST = ("missing", "damaged", "manifest")
"""Findings that nothing here can put right."""
Progress = Callable[[int, int, str], None]
"""Called with versions done, versions in all, and the one that comes next."""


@dataclass(frozen=True)
class Finding:
    what: str
    """`missing`, `damaged`, `manifest` (it lists other files), `copy`, `extra` or `whole` (again)."""
    digest: str
    """Or `staging/…`."""
    versions: tuple[str, ...]
    detail: str
    repaired: str | None = None
    """What was done about it."""


@dataclass(frozen=True)
class Report:
    versions: int
    blobs: int
    size_bytes: int
    """Of what was read, as far as manifests tell."""
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong, or all of it was put right. A version that was marked `failed` is still broken."""
        return all(each.repaired and each.what not in LOST for each in self.findings)

    def to_json(self) -> dict[str, Any]:
        return {"object": "adapter.verification", "sound": self.sound, **asdict(self)}


def verify(
    store: Store,
    registry: Registry,
    *,
    repair: bool = False,
    keep: Collection[str] = (),
    progress: Progress = lambda done, total, ref: None,
) -> Report:
    """May run beside uploads and deletions. `keep`: digests that are in use although nobody refers to them."""
    versions = [version for adapter in registry.adapters() for version in adapter.versions]
    by_digest: dict[str, list[Version]] = {}
    for version in versions:
        by_digest.setdefault(version.digest, []).append(version)
    findings: list[Finding] = []
    done = 0
    for digest, same in by_digest.items():
        progress(done, len(versions), same[0].ref)
        if _suspicious(store, digest, same):
            findings += _settle(store, registry, digest, same, repair)
        done += len(same)
    progress(done, len(versions), "")
    with agreeing(store, registry):
        extra = (store.sweep if repair else store.leftovers)(registry.digests().union(keep))
    findings += [_extra(name, repair) for name in extra]
    size_bytes = sum(same[0].manifest.size_bytes for same in by_digest.values())
    return Report(len(versions), len(by_digest), size_bytes, tuple(findings))


def _suspicious(store: Store, digest: str, versions: Sequence[Version]) -> bool:
    """Looked at without a lock: a deletion may be in the middle of it."""
    files = store.hashes(digest)
    if any(_is_marked(version) for version in versions) or any(_differences(files, digest, versions)):
        return True
    return bool(store.mend(digest, files, dry_run=True))


def _settle(
    store: Store, registry: Registry, digest: str, versions: Sequence[Version], repair: bool
) -> Iterator[Finding]:
    """Looked at again, and put right, while nobody uploads or deletes."""
    with agreeing(store, registry):
        there = [now for version in versions if (now := _now(registry, version)) is not None]
        if not there:
            return
        refs = tuple(version.ref for version in there)
        for wrong in store.mend(digest, store.hashes(digest), dry_run=not repair):
            yield Finding("copy", digest, refs, wrong, "put right" if repair else None)
        broken = False
        for what, detail in _differences(store.hashes(digest), digest, there):
            broken = broken or what != "manifest"
            yield Finding(what, digest, refs, detail, _mark(registry, there, detail) if repair and broken else None)
        if not broken and any(_is_marked(version) for version in there):
            done = _unmark(registry, there) if repair else None
            yield Finding("whole", digest, refs, f"{BROKEN}whole again", done)


def _differences(files: Mapping[str, str], digest: str, versions: Sequence[Version]) -> Iterator[tuple[str, str]]:
    """What is wrong, and in words."""
    wanted = versions[0].manifest.files
    if not files:
        yield "missing", f"{BROKEN}missing"
        return
    if digest_of(files) != digest:
        gone = sorted(wanted.keys() - files.keys())
        others = sorted(name for name in files if files[name] != wanted.get(name))
        parts = [f"{what}: {', '.join(names)}" for what, names in (("missing", gone), ("changed", others)) if names]
        yield "damaged", f"{BROKEN}damaged ({'; '.join(parts) or 'none of them is known'})"
    for version in versions:
        if version.manifest.digest != digest or (digest_of(files) == digest and version.manifest.files != files):
            yield "manifest", f"the manifest of {version.ref} lists other files than its digest is made of"


def _mark(registry: Registry, versions: Sequence[Version], detail: str) -> str:
    marked = [
        version.ref
        for version in versions
        if registry.set_state(version.adapter, version.number, FAILED, detail, only_from=READY)
    ]
    return f"marked as {FAILED}: {', '.join(marked)}" if marked else "nothing: not served anyway"


def _unmark(registry: Registry, versions: Sequence[Version]) -> str:
    for version in versions:
        if _is_marked(version):
            registry.set_state(version.adapter, version.number, READY, only_from=FAILED)
    return f"marked as {READY}"


def _is_marked(version: Version) -> bool:
    return version.state == FAILED and (version.reason or "").startswith(BROKEN)


def _now(registry: Registry, version: Version) -> Version | None:
    """As it is now, or None when it went meanwhile or is about to."""
    try:
        now = registry.resolve(version.adapter, str(version.number))
    except NotFound:
        return None
    return None if now.state == DRAINING or now.digest != version.digest else now


def _extra(name: str, repair: bool) -> Finding:
    detail = "a crash left it" if not name.startswith("sha256:") else "no version refers to it"
    return Finding("extra", name, (), detail, "removed" if repair else None)
