"""What a reference means within one adapter: a number, `latest`, a digest prefix or an alias. Knows no database."""

from __future__ import annotations

from collections.abc import Sequence

from adapters import names
from adapters.errors import NotFound
from adapters.records import DRAINING, Adapter, Version
from adapters.servable import Answers, is_servable, nobody
from adapters.targets import choose, main_version

SHOWN = 8


def living(versions: Sequence[Version], digest: str) -> Version | None:
    same = [version for version in versions if version.digest == digest and version.state != DRAINING]
    return same[-1] if same else None


def pick(adapter: Adapter, ref: str, sticky: str | None = None, answers: Answers = nobody) -> Version:
    """`sticky`: whose request it is, so that one user always gets the same version of a split alias."""
    if names.NUMBER.fullmatch(ref):
        return only(adapter, ref, [version for version in adapter.versions if version.number == int(ref)])
    if names.DIGEST_PREFIX.fullmatch(ref):
        return _by_digest(adapter, ref)
    if ref == names.LATEST:
        return only(adapter, ref, [adapter.latest] if adapter.latest else [])
    target = adapter.targets.get(ref, {})
    sharing = [version for version in adapter.versions if version.number in target]
    servable = {version.number: target[version.number] for version in sharing if is_servable(version, answers)}
    if len(sharing) > 1 and servable:
        chosen = choose(servable, f"{adapter.name}@{ref}", sticky)
    else:
        chosen = main_version(target) if target else 0  # in whatever state: the caller hears why it cannot serve
    return only(adapter, ref, [version for version in sharing if version.number == chosen])


def _by_digest(adapter: Adapter, ref: str) -> Version:
    """Bytes uploaded again while their old version drains exist twice; the living version is meant."""
    matching = [version for version in adapter.versions if version.digest.startswith(ref)]
    if len({version.digest for version in matching}) > 1:
        raise NotFound(f"{adapter.name}@{ref} fits {len(matching)} versions; give more digits of the digest")
    living = [version for version in matching if version.state != DRAINING]
    return only(adapter, ref, (living or matching)[-1:])


def only(adapter: Adapter, ref: str, found: Sequence[Version]) -> Version:
    if not found:
        raise unknown_ref(adapter, ref)
    return found[0]


def unknown_ref(adapter: Adapter, ref: str) -> NotFound:
    numbers = [f"{version.number} ({version.state})" for version in reversed(adapter.versions)]
    return NotFound(
        f"adapter {adapter.name!r} has no version or alias {ref[:140]!r}; "
        f"versions: {listed(numbers)}; aliases: {listed(list(adapter.aliases))}"
    )


def listed(words: Sequence[str], count: int | None = None) -> str:
    """The first few; `count`: how many there are, where `words` holds not all of them."""
    count = len(words) if count is None else count
    more = f" and {count - SHOWN} more" if count > SHOWN else ""
    return (", ".join(words[:SHOWN]) or "none") + more
