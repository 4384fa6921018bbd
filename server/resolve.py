"""The `model` string of a request → the base model, or one adapter version and where its files lie.

    ""  base          the base model          name            its default alias
    name@alias        an alias                name@3          a version number
    name@sha256:…     by content              base:name[@ref] the spelling of SGLang, Ray and others

Names are looked up in our registry only; a client's string is never a path. Knows no engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import InvalidAdapter, NotFound
from adapters.names import DEFAULT, is_alias
from adapters.records import MERGE_ONLY, READY
from adapters.registry import Registry, Version
from adapters.servable import is_servable
from adapters.store import Store
from server.errors import AdapterUnavailable, ModelNotFound, ServerError


@dataclass(frozen=True)
class Target:
    """What will answer. `version` and `path` are None for the base model; `path` also while the files are elsewhere."""

    asked: str
    version: Version | None = None
    path: Path | None = None
    alias: str | None = None
    """Through which the version was found, if it was through one."""

    @property
    def engine_name(self) -> str:
        assert self.version is not None
        return engine_name(self.version)


def engine_name(version: Version) -> str:
    """The immutable name under which the engine (and its prefix cache) sees a version."""
    return f"{version.adapter}@{version.digest.removeprefix('sha256:')[:12]}"


WhyNot = Callable[[Version, str | None], ServerError | None]
"""Of a version that is merge only, and the alias it was found through: why no engine answers; None: one does, or will
shortly."""


class Resolver:
    def __init__(self, registry: Registry, store: Store, base_name: str, why_not_merged: WhyNot) -> None:
        self._registry = registry
        self._store = store
        self._why_not_merged = why_not_merged
        self.base_name = base_name

    def resolve(self, asked: str, sticky: str | None = None) -> Target:
        """`sticky`: whose request it is, for aliases that several versions share.

        Raises ModelNotFound, AdapterUnavailable for a version that exists but must not serve, and what stands in the
        way of one that only a merged engine can serve.
        """
        if self._is_base(asked):
            return Target(self.base_name)
        name, ref = self._split(asked)
        try:
            version = self._registry.resolve(name, ref, sticky=sticky)
        except (NotFound, InvalidAdapter) as error:
            raise _not_found(asked, str(error)) from None
        if version.state == MERGE_ONLY:
            if (why_not := self._why_not_merged(version, _alias(ref))) is not None:
                raise why_not
        elif version.state != READY:
            raise AdapterUnavailable(
                f"adapter {version.ref} is {version.state}" + (f": {version.reason}" if version.reason else ""),
                code=f"adapter_{version.state}",
                param="model",
            )
        return self._target(asked, ref, version)

    async def find(self, asked: str, sticky: str | None = None) -> Target:
        """The same for an event loop: on a thread only where it is not known at once."""
        known = self._at_once(asked, sticky)
        return known if known is not None else await asyncio.to_thread(self.resolve, asked, sticky)

    def _at_once(self, asked: str, sticky: str | None) -> Target | None:
        if self._is_base(asked):
            return Target(self.base_name)
        name, ref = self._split(asked)
        version = self._registry.resolve_at_once(name, ref, sticky=sticky)
        if version is None or not is_servable(version, self._registry.answers):
            return None  # `resolve` says why
        return self._target(asked, ref, version)

    def _is_base(self, asked: str) -> bool:
        return asked in ("", self.base_name)

    def _split(self, asked: str) -> tuple[str, str | None]:
        name, _, ref = asked.removeprefix(self.base_name + ":").partition("@")
        return name, ref or None

    def _target(self, asked: str, ref: str | None, version: Version) -> Target:
        return Target(asked, version, self._store.at_hand(version.digest), _alias(ref))


def _alias(ref: str | None) -> str | None:
    return ref or DEFAULT if is_alias(ref or DEFAULT) else None


def _not_found(asked: str, detail: str) -> ModelNotFound:
    return ModelNotFound(
        f"The model `{asked}` does not exist or you do not have access to it ({detail}).", param="model"
    )
