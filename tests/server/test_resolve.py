from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from adapters.registry import Version
from server.errors import AdapterUnavailable, ModelNotFound, ServerError
from server.resolve import Resolver
from tests.adapters.factories import write_base
from tests.server.harness import World, adapter_files, ingest, world


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Three versions of `a`; `default` is 3, `stable` is 1."""
    root = tmp_path_factory.mktemp("shop")
    return stocked(world(write_base(root / "tiny"), root / "data"))


@pytest.fixture(scope="module")
def resolver(shop: World) -> Resolver:
    return shop.services.generator._resolver


@pytest.fixture(scope="module")
def versions(shop: World) -> Sequence[Version]:
    return shop.services.registry.adapter("a").versions


@pytest.fixture
def own(built: World) -> World:
    """The same for one test alone."""
    return stocked(built)


def stocked(built: World) -> World:
    for seed in (1, 2, 3):
        ingest(built, "a", seed)
    built.services.registry.set_alias("a", "stable", 1)
    return built


@pytest.mark.parametrize("asked", ["", "tiny"])
def test_the_base_model(resolver: Resolver, asked: str) -> None:
    target = resolver.resolve(asked)
    assert (target.asked, target.version, target.path) == ("tiny", None, None)


async def test_what_is_known_is_found_without_a_thread(own: World, monkeypatch: pytest.MonkeyPatch) -> None:
    resolver, registry = own.services.generator._resolver, own.services.registry
    found = {asked: await resolver.find(asked) for asked in ("", "a", "a@stable", "a@2", "tiny:a@latest")}
    assert found == {asked: resolver.resolve(asked) for asked in found}
    with monkeypatch.context() as changed:
        changed.setattr(resolver, "resolve", None)
        assert found == {asked: await resolver.find(asked) for asked in found}
    registry.set_alias("a", "default", 2)
    assert await resolver.find("a") == resolver.resolve("a") != found["a"]


@pytest.mark.parametrize("state", ["draining", "quarantined", "failed"])
async def test_what_was_known_and_is_out_of_service_now_says_why(own: World, state: str) -> None:
    resolver = own.services.generator._resolver
    assert (await resolver.find("a")).version is not None
    own.services.registry.set_state("a", 3, state, "it said NaN")
    for _ in range(2):
        with pytest.raises(AdapterUnavailable, match=f"adapter a@3 is {state}: it said NaN"):
            await resolver.find("a")


@pytest.mark.parametrize(
    ("asked", "number"),
    [
        ("a", 3),
        ("a@default", 3),
        ("a@stable", 1),
        ("a@latest", 3),
        ("a@2", 2),
        ("tiny:a", 3),
        ("tiny:a@stable", 1),
        ("tiny:a@2", 2),
    ],
)
def test_an_adapter_by_name_alias_or_number(
    resolver: Resolver, versions: Sequence[Version], asked: str, number: int
) -> None:
    target = resolver.resolve(asked)
    assert target.asked == asked
    assert target.version == versions[number - 1]


@pytest.mark.parametrize("digits", [12, 64])
def test_an_adapter_by_content(resolver: Resolver, versions: Sequence[Version], digits: int) -> None:
    digest = versions[1].digest[: len("sha256:") + digits]
    assert resolver.resolve(f"a@{digest}").version == versions[1]


def test_the_path_holds_the_files_of_that_version(resolver: Resolver, versions: Sequence[Version]) -> None:
    path = resolver.resolve("a@2").path
    assert path is not None
    assert (path / "adapter_model.safetensors").read_bytes() == adapter_files(2).files()["adapter_model.safetensors"]


def test_the_engine_sees_name_and_digest(resolver: Resolver, versions: Sequence[Version]) -> None:
    assert resolver.resolve("a@2").engine_name == f"a@{versions[1].digest.removeprefix('sha256:')[:12]}"


@pytest.mark.parametrize(
    "asked",
    [
        "none", "a@9", "a@0", "a@-1", "a@nightly", "a@sha256:0123", "a@sha256:" + "0" * 64, "A", "a ", " a", "tiny@1",
        "other:a", "tiny:", "tiny:tiny", "tiny:tiny:a", "@1", "../a", "/etc/passwd", "a/../a", "a\0", "a" * 5000, "ä",
        "a@2@stable", "%", "a%",
    ],
)  # fmt: skip
async def test_anything_else_does_not_exist(resolver: Resolver, asked: str) -> None:
    with pytest.raises(ModelNotFound) as missing:
        await resolver.find(asked)
    assert missing.value.param == "model"
    assert missing.value.code == "model_not_found"
    assert len(missing.value.message) < 12_000


@pytest.mark.parametrize("state", ["draining", "quarantined", "failed"])
def test_a_version_out_of_service_says_why(own: World, state: str) -> None:
    resolver = own.services.generator._resolver
    own.services.registry.set_state("a", 3, state, "it said NaN")
    with pytest.raises(AdapterUnavailable, match=f"adapter a@3 is {state}: it said NaN") as refused:
        resolver.resolve("a")
    assert refused.value.code == f"adapter_{state}"
    assert resolver.resolve("a@1").version is not None


def test_an_alias_moves_without_a_restart(own: World) -> None:
    own.services.registry.set_alias("a", "default", 2)
    version = own.services.generator._resolver.resolve("a").version
    assert version is not None
    assert version.number == 2


def test_nothing_is_looked_up_on_the_disk(resolver: Resolver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter_files().write(tmp_path / "plain")
    monkeypatch.chdir(tmp_path)
    for asked in ("plain", str(tmp_path / "plain"), "./plain", f"file://{tmp_path}/plain"):
        with pytest.raises(ServerError):
            resolver.resolve(asked)
