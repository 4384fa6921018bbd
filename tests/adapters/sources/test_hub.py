"""`hf://` by the hub's real client, against a server on loopback that speaks its protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from adapters.errors import AdapterError, SourceError, SourceForbidden, SourceNotFound, SourceUnavailable
from adapters.sources.address import Policy, parse
from adapters.sources.fetch import Fetched, Progress, fetch
from adapters.sources.hub import Place, place_of
from adapters.upload import UploadLimits
from tests.adapters.factories import AdapterFiles, tar
from tests.adapters.web_server import COMMIT, Answer, WebServer, hub_of, serving

FILES = AdapterFiles().files()
OTHERS = {"adapter_model.bin": b"pickle", "optimizer.pt": b"pickle", "runs/events": b"x", ".gitattributes": b"x"}
REPOSITORIES: Mapping[str, Mapping[str, bytes]] = {
    "org/plain": {**FILES, **OTHERS},
    "org/folders": {**{f"run/last/{name}": content for name, content in FILES.items()}, "README.md": b"many"},
    "org/packed": {"adapter.tar.gz": tar(FILES), "adapter.bin": b"x"},
    "org/private": FILES,
    "org/empty": OTHERS,
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    with serving(hub_of(REPOSITORIES)) as server:
        use(server, monkeypatch)
        yield server


def use(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the process had been started with HF_ENDPOINT, which the client reads when it is imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")


def read(address: str, into: Path, seen: list[Progress] | None = None) -> tuple[Fetched, dict[str, bytes]]:
    watch = (lambda _: None) if seen is None else seen.append
    fetched = fetch(parse(address), Policy(("hf",)), into, UploadLimits(max_bytes=1 << 20, max_files=50), watch)
    return fetched, {path.name: path.read_bytes() for path in into.iterdir()}


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_repository_gives_its_kept_files_of_one_commit(hub: WebServer, tmp_path: Path, revision: str) -> None:
    seen: list[Progress] = []
    fetched, found = read(f"hf://org/plain{revision}", tmp_path, seen)
    assert found == FILES
    total = sum(map(len, FILES.values()))
    assert (seen[-1].bytes, seen[-1].total_bytes) == (total, total)
    assert fetched.lineage == {
        "url": f"hf://org/plain@{COMMIT}",
        "asked": f"hf://org/plain{revision}",
        "commit": COMMIT,
    }
    resolved = [path for path in hub.asked if "/resolve/" in path]
    assert resolved == [f"/org/plain/resolve/{COMMIT}/{name}" for name in sorted(FILES)]


def test_a_folder_of_a_repository(hub: WebServer, tmp_path: Path) -> None:
    fetched, found = read("hf://org/folders@main/run/last/", tmp_path)
    assert found == FILES
    assert fetched.lineage["url"] == f"hf://org/folders@{COMMIT}/run/last"


def test_an_archive_in_a_repository(hub: WebServer, tmp_path: Path) -> None:
    assert read("hf://org/packed/adapter.tar.gz", tmp_path)[1] == {
        "adapter.tar.gz": REPOSITORIES["org/packed"]["adapter.tar.gz"]
    }


@pytest.mark.parametrize(
    ("address", "error", "said"),
    [
        ("hf://org/none", SourceNotFound, "no repository org/none"),
        ("hf://org/plain@v9", SourceNotFound, "no revision 'v9'"),
        ("hf://org/plain/run", SourceNotFound, "no folder 'run'"),
        ("hf://org/gated", SourceForbidden, "behind a form"),
        ("hf://org/private", SourceNotFound, "HF_TOKEN"),
        ("hf://org/packed/adapter.bin", SourceError, "no archive"),
        ("hf://org/empty", AdapterError, "holds none of an adapter's files"),
    ],
)
def test_what_cannot_be_read_says_why(
    hub: WebServer, tmp_path: Path, address: str, error: type[AdapterError], said: str
) -> None:
    with pytest.raises(error, match=said):
        read(address, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_token_of_the_server_opens_what_is_private(
    hub: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_swordfish")
    fetched, found = read("hf://org/private", tmp_path)
    assert found == FILES
    assert "swordfish" not in str(fetched)


def test_offline_means_offline(hub: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceUnavailable, match="HF_HUB_OFFLINE") as error:
        read("hf://org/plain", tmp_path)
    assert error.value.code == "hub_offline"
    assert hub.asked == []


def test_a_hub_that_fails_or_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda *_: Answer(500)) as server:
        use(server, monkeypatch)
        with pytest.raises(SourceUnavailable, match="the hub answers 500"):
            read("hf://org/plain", tmp_path)
    with pytest.raises(SourceUnavailable, match="could not be read"):
        read("hf://org/plain", tmp_path)


def test_a_file_that_is_not_what_the_hub_describes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {**FILES, "adapter_model.safetensors": FILES["adapter_model.safetensors"][:-1] + b"x"}
    described, sent = hub_of({"org/plain": FILES}), hub_of({"org/plain": changed})
    with serving(lambda path, headers: (sent if "/resolve/" in path else described)(path, headers)) as server:
        use(server, monkeypatch)
        with pytest.raises(SourceUnavailable, match="arrived damaged") as error:
            read("hf://org/plain", tmp_path)
    assert error.value.code == "source_damaged"


@pytest.mark.parametrize(
    ("rest", "place"),
    [
        ("o/n", Place("o/n", None, "")),
        ("o/n/", Place("o/n", None, "")),
        ("o/n@v1.0", Place("o/n", "v1.0", "")),
        ("o/n@feature%2Fx/a/b", Place("o/n", "feature/x", "a/b")),
        ("o/n@refs/pr/3/a", Place("o/n", "refs/pr/3", "a")),
        ("o/n/a@b", Place("o/n", None, "a@b")),
    ],
)
def test_how_a_place_is_written(rest: str, place: Place) -> None:
    assert place_of(parse(f"hf://{rest}")) == place


@pytest.mark.parametrize("rest", ["name", "datasets/o/n", "spaces/o/n", "o/n@", "/o/n", "o//n", "o/n@a@b"])
def test_what_names_no_model_repository(rest: str) -> None:
    with pytest.raises(SourceError, match="names no model repository"):
        place_of(parse(f"hf://{rest}"))
