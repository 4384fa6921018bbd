"""What the registry hands out: adapters and their versions, frozen. Knows no database."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from adapters.manifest import Manifest
from adapters.tags import Tags
from adapters.targets import Target, aliases_of, main_versions, splits_of

CHECKING, READY, MERGE_ONLY = "checking", "ready", "merge_only"
DRAINING, QUARANTINED, FAILED = "draining", "quarantined", "failed"
STATES = (CHECKING, READY, MERGE_ONLY, DRAINING, QUARANTINED, FAILED)


@dataclass(frozen=True)
class Version:
    """One immutable set of files under a name."""

    adapter: str
    number: int
    digest: str
    state: str
    """`checking` (the engine has not tried it yet), `ready`, `merge_only` (no engine can swap it), `draining` (being
    deleted), `quarantined` (produced garbage) or `failed` (the engine did not take it, or its files are damaged)."""
    reason: str | None
    """Why it is in this state, for a person."""
    created_at: datetime
    manifest: Manifest
    probe: Mapping[str, Any] | None = None
    """What the engine answered with it, compared with the base; None where it was never tried."""
    pending: Mapping[str, Any] | None = None
    """While it is checked: what is to be done when it passes, and how often it was tried."""

    @property
    def ref(self) -> str:
        return f"{self.adapter}@{self.number}"

    @property
    def key(self) -> tuple[str, int]:
        return self.adapter, self.number


@dataclass(frozen=True)
class Move:
    """An alias that pointed to `old` and from then on to `new`; empty where it was not there."""

    alias: str
    old: Target
    new: Target
    how: str
    """`upload`, `set`, `remove`, `delete` (of the version) or `rollback`."""
    by: str | None
    """The id of the API key, where it is known."""
    at: datetime
    undone: bool
    """Whether a rollback took it back."""


@dataclass(frozen=True)
class About:
    """What the registry knows of a version beside its record."""

    aliases: list[str]
    """Those that point to it, alone or among others."""
    tags: Tags
    parents: Mapping[str, str | None]
    """A parent as the lineage names it → `name@number` of the version here that is meant."""
    revision: int
    """Of the adapter."""
    fidelity: Mapping[str, Any] | None = None
    """What its last merge kept of it, in a few figures; None where it never was merged."""


@dataclass(frozen=True)
class Shadow:
    """A version that gets a copy of some of an alias's requests; its answers are compared and dropped."""

    number: int
    percent: int
    """How many of a hundred requests."""


@dataclass(frozen=True)
class Overview:
    """A name with how many versions it has, of which there may be thousands."""

    name: str
    description: str | None
    created_at: datetime
    counts: Mapping[str, int]
    """State → how many versions are in it."""
    latest: int | None
    """The highest number of those that are ready."""
    targets: Mapping[str, Target]
    """Alias → where it points."""
    tags: Tags
    revision: int
    shadows: Mapping[str, Shadow]

    @property
    def aliases(self) -> dict[str, int]:
        return main_versions(self.targets)

    @property
    def splits(self) -> dict[str, Target]:
        return splits_of(self.targets)


@dataclass(frozen=True)
class Alias:
    """One alias: where it points, and its moves, the latest first."""

    adapter: str
    name: str
    target: Target
    """Empty: it is gone."""
    shadow: Shadow | None
    moves: tuple[Move, ...]
    revision: int
    """Of the adapter."""


@dataclass(frozen=True)
class Adapter:
    """A name with its versions in ascending order, and the aliases that point at them."""

    name: str
    description: str | None
    created_at: datetime
    versions: tuple[Version, ...]
    targets: Mapping[str, Target]
    """Alias → where it points."""
    tagged: Mapping[int, Tags] = field(default_factory=dict)
    """Version number → tags; 0 has the adapter's own."""
    revision: int = 0
    """How often anything of it has changed in the registry."""
    shadows: Mapping[str, Shadow] = field(default_factory=dict)
    """Alias → its shadow; who has none is not there."""

    @property
    def aliases(self) -> dict[str, int]:
        """Alias → the version that has the most of its traffic."""
        return main_versions(self.targets)

    @property
    def splits(self) -> dict[str, Target]:
        """Only the aliases that several versions share."""
        return splits_of(self.targets)

    def aliases_of(self, number: int) -> list[str]:
        """Those that point to this version, alone or among others."""
        return aliases_of(self.targets, number)

    @property
    def tags(self) -> Tags:
        return self.tags_of(0)

    def tags_of(self, number: int) -> Tags:
        """Of one version."""
        return self.tagged.get(number, {})

    @property
    def latest(self) -> Version | None:
        """The ready version with the highest number."""
        ready = [version for version in self.versions if version.state == READY]
        return ready[-1] if ready else None
