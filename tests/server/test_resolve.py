from __future__ import annotations

from pathlib import Path

import pytest

from adapters.registry import Version
from server.errors import AdapterUnavailable, ModelNotFound, ServerError
from server.resolve import Resolver
from tests.server.harness import World, adapter_files


@pytest.fixture
def versions(built: World) -> list[Version]:
    """Three versions of `a`; `default` is 3, `stable` is 1."""
    ingest = built.services.ingest
    made = [ingest.upload("a", adapter_files(seed).uploads())[0] for seed in (1, 2, 3)]
    built.services.registry.set_alias("a", "stable", 1)
    return made


@pytest.fixture
def resolver(built: World, versions: list[Version]) -> Resolver:
    return built.services.generator._resolver


@pytest.mark.parametrize("asked", ["", "tiny"])
def test_the_base_model(resolver: Resolver, asked: str) -> None:
    target = resolver.resolve(asked)
    assert (target.asked, target.version, target.path) == ("tiny", None, None)


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
    resolver: Resolver, versions: list[Version], asked: str, number: int
) -> None:
    target = resolver.resolve(asked)
    assert target.asked == asked
    assert target.version == versions[number - 1]


@pytest.mark.parametrize("digits", [12, 64])
def test_an_adapter_by_content(resolver: Resolver, versions: list[Version], digits: int) -> None:
    digest = versions[1].digest[: len("sha256:") + digits]
    assert resolver.resolve(f"a@{digest}").version == versions[1]


def test_the_path_holds_the_files_of_that_version(resolver: Resolver, versions: list[Version]) -> None:
    path = resolver.resolve("a@2").path
    assert path is not None
    assert (path / "adapter_model.safetensors").read_bytes() == adapter_files(2).files()["adapter_model.safetensors"]


def test_the_engine_sees_name_and_digest(resolver: Resolver, versions: list[Version]) -> None:
    assert resolver.resolve("a@2").engine_name == f"a@{versions[1].digest.removeprefix('sha256:')[:12]}"


@pytest.mark.parametrize(
    "asked",
    [
        "none", "a@9", "a@0", "a@-1", "a@nightly", "a@sha256:0123", "a@sha256:" + "0" * 64, "A", "a ", " a", "tiny@1",
        "other:a", "tiny:", "tiny:tiny", "tiny:tiny:a", "@1", "../a", "/etc/passwd", "a/../a", "a\0", "a" * 5000, "ä",
        "a@2@stable", "%", "a%",
    ],
)  # fmt: skip
def test_anything_else_does_not_exist(resolver: Resolver, asked: str) -> None:
    with pytest.raises(ModelNotFound) as missing:
        resolver.resolve(asked)
    assert missing.value.param == "model"
    assert missing.value.code == "model_not_found"
    assert len(missing.value.message) < 12_000


@pytest.mark.parametrize("state", ["draining", "quarantined", "failed"])
def test_a_version_out_of_service_says_why(resolver: Resolver, built: World, state: str) -> None:
    built.services.registry.set_state("a", 3, state, "it said NaN")
    with pytest.raises(AdapterUnavailable, match=f"adapter a@3 is {state}: it said NaN") as refused:
        resolver.resolve("a")
    assert refused.value.code == f"adapter_{state}"
    assert resolver.resolve("a@1").version is not None


def test_an_alias_moves_without_a_restart(resolver: Resolver, built: World, versions: list[Version]) -> None:
    built.services.registry.set_alias("a", "default", 2)
    assert resolver.resolve("a").version == versions[1]


def test_nothing_is_looked_up_on_the_disk(built: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter_files().write(tmp_path / "plain")
    monkeypatch.chdir(tmp_path)
    for asked in ("plain", str(tmp_path / "plain"), "./plain", f"file://{tmp_path}/plain"):
        with pytest.raises(ServerError):
            built.services.generator._resolver.resolve(asked)
