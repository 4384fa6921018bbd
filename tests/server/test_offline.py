"""`loraplex adapters … --data-dir`: the store itself is asked, with the same answers; not behind a server's back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from adapters.errors import StoreError
from adapters.registry import Shadow
from server.cli import main
from tests.server.harness import World, adapter_files, ingest, world

Call = Callable[..., str]


@pytest.fixture(params=["local", "s3"])
def made(request: pytest.FixtureRequest, tiny_base: Path, tmp_path: Path) -> World:
    """What a server has left: `a` with four versions, `b` with one."""
    where: dict[str, Any] = {} if request.param == "local" else {"store_url": f"{request.getfixturevalue('s3')()}/x"}
    left = world(tiny_base, tmp_path / "data", **where)
    for seed in (1, 2, 3, 4):
        ingest(left, "a", seed)
    ingest(left, "b", 1)
    return left


@pytest.fixture
def call(made: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    monkeypatch.setenv("COLUMNS", "200")
    if made.settings.store_url:
        monkeypatch.setenv("LORAPLEX_STORE_URL", made.settings.store_url)

    def call(*words: str, code: int = 0) -> str:
        assert main(["adapters", words[0], "--data-dir", str(made.settings.data_dir), *words[1:]]) == code
        shown = capsys.readouterr()
        return shown.out + shown.err

    return call


def spoil(made: World, ref: str, content: bytes) -> None:
    """The configuration of a version, where it is kept; the copy of this machine too."""
    name, _, number = ref.partition("@")
    digest = made.services.registry.resolve(name, number).digest
    store: Any = made.services.store
    if made.settings.store_url:
        store._bucket.write(f"blobs/{digest.removeprefix('sha256:')}/adapter_config.json", content)
        store._copies.delete(digest)
    else:
        (store.path(digest) / "adapter_config.json").write_bytes(content)


def test_what_is_there(call: Call) -> None:
    assert re.search(r"a +4 +4 +0 +\d{4}-\d\d-\d\d", call("list"))
    shown = call("show", "a")
    assert re.search(r"4 +ready +default", shown)
    assert "3 → 4  upload" in shown
    assert re.search(r"a@2\n +status +ready", call("show", "a@2"))
    assert "there is no adapter 'c'" in call("show", "c", code=1)


def test_a_server_answers_the_same(call: Call, made: World) -> None:
    told = [json.loads(call("list", "--json")), json.loads(call("show", "a@2", "--json"))]
    with made.client() as client:
        assert told == [
            {"data": client.get("/v1/adapters?summary=true").json()["data"]},
            client.get("/v1/adapters/a/versions/2").json(),
        ]


def test_aliases_move_also_beside_a_server(call: Call, made: World) -> None:
    with made.client():
        assert "default→2" in call("promote", "a", "2")
        assert "default→3=90 4=10" in call("split", "a", "3=90", "4=10")
        assert "default→2" in call("rollback", "a")
        assert "2 → 3=90 4=10  set by command line (taken back)" in call("show", "a")


def test_tags_and_shadows(call: Call, made: World) -> None:
    assert "a@2: stage=prod" in call("tag", "a@2", "stage=prod")
    assert " a " in call("list", "--tag", "stage=prod")
    assert "a@default: version 3 gets 10 %" in call("shadow", "a", "3")
    assert "shadow of default: version 3 gets 10 %; 0 compared" in call("show", "a")
    assert made.services.registry.alias("a", "default").shadow == Shadow(3, 10)
    assert "no shadow" in call("shadow", "a", "--off")


def test_pull(call: Call, tmp_path: Path) -> None:
    assert "a@2 in " in call("pull", "a@2", str(tmp_path / "pulled"))
    pulled = {path.name: path.read_bytes() for path in (tmp_path / "pulled").iterdir()}
    assert pulled == adapter_files(2).files()
    assert "which was there already" in call("pull", "a@2", str(tmp_path / "pulled"))


def test_rm(call: Call, made: World) -> None:
    assert "a@4 is what the alias default serves" in call("rm", "a@4", code=1)
    assert "deleted a@1" in call("rm", "a@1")
    assert "deleted b@1" in call("rm", "b")
    assert len(made.services.store.digests()) == 3
    assert "deleted a@2, a@3, a@4" in call("rm", "a")
    assert made.services.store.digests() == []


def test_gc(call: Call, made: World) -> None:
    dry = call("gc", "--keep", "1", "--dry-run")
    assert re.search(r"would be deleted:\n.*\n +a@1 +ready .*\n +a@2 +ready", dry)
    assert "kept, the last move of an alias came from it, and could be taken back: a@3" in dry
    assert len(made.services.store.digests()) == 4
    assert "no version would go" in call("gc", "b", "--keep", "1", "--dry-run")
    assert [each["version"] for each in json.loads(call("gc", "--keep", "1", "--json"))["deleted"]] == [1, 2]
    assert len(made.services.store.digests()) == 3
    assert "no version went" in call("gc", "--keep", "1")


def test_verify(call: Call, made: World) -> None:
    assert re.search(r"5 versions, 4 sets of files, [\d.]+ kB read: all is well", call("verify"))
    whole = adapter_files(2).files()["adapter_config.json"]
    spoil(made, "a@2", b"{}")
    found = call("verify", code=1)
    assert re.search(r"damaged +a@2 +its files are damaged \(changed: adapter_config.json\) +nothing", found)
    assert "marked as failed: a@2" in call("verify", "--repair", code=1)
    assert json.loads(call("show", "a@2", "--json"))["state"] == "failed"
    assert json.loads(call("verify", "--json", code=1))["sound"] is False
    spoil(made, "a@2", whole)
    assert "marked as ready" in call("verify", "--repair")
    assert "all is well" in call("verify")


@pytest.mark.parametrize("words", [["rm", "a@1"], ["rm", "a"], ["gc", "--keep", "1"], ["verify", "--repair"]])
def test_nothing_is_deleted_behind_the_back_of_a_server(call: Call, made: World, words: list[str]) -> None:
    with made.client():
        assert "a server is up on this registry" in call(*words, code=1)
        call("gc", "--keep", "1", "--dry-run")
        call("verify")
    assert len(made.services.store.digests()) == 4


def test_pushing_takes_a_server(call: Call, tmp_path: Path) -> None:
    adapter_files(9).write(tmp_path / "mine")
    assert "start the server and push it there" in call("push", str(tmp_path / "mine"), "--name", "mine", code=1)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "registry.db does not exist; give the data_dir of a server"),
        (["--database-url", "sqlite:///{other}/registry.db"], "adapters/registry does not exist"),
        (["--store-url", "file://{other}/adapters"], "registry.db does not exist"),
        (
            ["--database-url", "sqlite:///{other}/registry.db", "--store-url", "memory://none"],
            "belongs to no registry",
        ),
    ],
)
def test_nothing_is_made_where_nothing_is(
    built: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], complaint: str
) -> None:
    given = [flag.format(other=built.settings.data_dir) for flag in flags]
    assert main(["adapters", "verify", "--data-dir", str(tmp_path / "empty"), *given]) == 1
    assert complaint in capsys.readouterr().err.replace("\n", " ")
    assert not list((tmp_path / "empty").glob("*")) or "no registry" in complaint


def test_a_server_does_not_start_on_an_empty_store_of_a_full_registry(built: World, tiny_base: Path) -> None:
    """As when `store_url` was added, and nothing copied: every version would be missing."""
    ingest(built, "a", 1)
    with pytest.raises(StoreError, match="the registry has versions, but the store") as refused:
        world(tiny_base, built.settings.data_dir, store_url="memory://new-and-empty")
    assert refused.value.code == "other_store"


def test_a_local_store_moves_into_a_bucket(
    built: World, tiny_base: Path, s3: Callable[[], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """As the README says: copy `blobs`, start with store_url once, verify --repair."""
    ingest(built, "a", 1)
    url = s3()
    fsspec.filesystem("s3").put(f"{built.settings.data_dir}/adapters/blobs", f"{url}/blobs", recursive=True)
    moved = world(tiny_base, built.settings.data_dir, store_url=url)
    flags = ["--data-dir", str(built.settings.data_dir), "--store-url", url]
    assert main(["adapters", "verify", *flags]) == 1
    assert main(["adapters", "verify", *flags, "--repair"]) == 0
    assert main(["adapters", "verify", *flags]) == 0
    assert "all is well" in capsys.readouterr().out
    version = moved.services.registry.resolve("a")
    assert moved.services.store.path(version.digest).is_dir()


def test_both_at_once_is_wrongly_called(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["adapters", "list", "--server", "http://x", "--data-dir", "x"])
    assert ended.value.code == 2
    assert "not allowed with" in capsys.readouterr().err
