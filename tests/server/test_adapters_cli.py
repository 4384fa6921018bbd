"""`loraplex adapters` against a server on a real socket, with the fake engine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapters.remote import Remote
from server.adapters_cli import tables
from server.cli import main
from server.launch import ServerProcess, free_port
from tests.adapters.factories import tar
from tests.server.harness import adapter_files

Call = Callable[..., str]


@pytest.fixture
def call(live_server: ServerProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`loraplex adapters WORDS`; its output, errors included."""
    monkeypatch.setenv("LORAPLEX_SERVER", live_server.url)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: str, code: int = 0) -> str:
        assert main(["adapters", *words]) == code
        shown = capsys.readouterr()
        return shown.out + shown.err

    return call


@pytest.fixture(autouse=True)
def _leaves_nothing(live_server: ServerProcess) -> Iterator[None]:
    yield
    with Remote(live_server.url) as remote:
        for adapter in list(remote.adapters()):
            remote.delete(adapter["name"], None, 10)


@pytest.fixture
def directory(tmp_path: Path) -> Callable[[int], str]:
    """Writes an adapter as PEFT does."""

    def write(seed: int) -> str:
        path = tmp_path / f"adapter-{seed}"
        path.mkdir()
        for name, content in adapter_files(seed).files().items():
            (path / name).write_bytes(content)
        return str(path)

    return write


def test_the_life_of_an_adapter(call: Call, directory: Callable[[int], str]) -> None:
    assert "no adapters on http://127.0.0.1" in call("list")
    first = directory(1)
    pushed = call("push", first, "--name", "mine", "--description", "the [first]")
    assert "mine@1" in pushed
    assert re.search(r"aliases +default\n", pushed)
    assert "which it was already" in call("push", first, "--name", "mine")
    assert "mine@2" in call("push", directory(2), "--name", "mine")

    listed = call("list")
    assert re.search(r"mine +2 +2 +\d +\d{4}-\d\d-\d\d +the \[first\]", listed)
    assert "default→1" in call("promote", "mine", "1")
    assert "blue→2, default→1" in call("promote", "mine", "2", "--alias", "blue")
    assert "blue→2, default→2" in call("rollback", "mine")

    assert "default→1=90 2=10" in call("split", "mine", "1=90", "2=10")
    assert re.search(r"mine +1=90 2=10 +blue→2", call("list"))
    assert "blue→2, default→2" in call("rollback", "mine")

    shown = call("show", "mine")
    assert re.search(r"2 +resident +blue, default", shown)
    assert "1 → 2  upload by anonymous" in shown
    assert "2 → 1  set by anonymous (taken back)" in shown
    assert "2 → 1=90 2=10  set by anonymous (taken back)" in shown
    assert "mine@1" in call("show", "mine@1")

    assert "deleted mine@1" in call("rm", "mine@1")
    assert "deleted mine@2" in call("rm", "mine")
    assert "no adapters" in call("list")


def test_tags_find_an_adapter_again(call: Call, directory: Callable[[int], str]) -> None:
    pushed = call("push", directory(1), "--name", "tagged", "--tag", "stage=[new]", "--tag", "team=search")
    assert re.search(r"tags +stage=\[new\] team=search\n", pushed)
    call("push", directory(2), "--name", "bare")
    assert "tagged@1: stage=prod" in call("tag", "tagged@1", "stage=prod", "team-")
    assert "tagged: owner=ann" in call("tag", "tagged", "owner=ann")
    shown = call("show", "tagged")
    assert "tags: owner=ann" in shown
    assert re.search(r"1 +resident .* stage=prod", shown)
    found = call("list", "--tag", "stage=prod")
    assert " tagged " in found
    assert " bare " not in found
    assert " bare " in call("list", "ba*", "--state", "ready")
    assert "no such adapters" in call("list", "--tag", "stage=old")
    assert "tagged: no tags" in call("tag", "tagged", "owner-")
    assert "(bad_tags)" in call("tag", "tagged", "a b=c", code=1)


def test_a_shadow_is_set_shown_and_taken_away(call: Call, directory: Callable[[int], str]) -> None:
    for seed in (1, 2):
        call("push", directory(seed), "--name", "shaded")
    assert "shaded@default: version 1 gets 100 % of its requests" in call("shadow", "shaded", "1", "--percent", "100")
    assert "shadow of default: version 1 gets 100 %; 0 compared" in call("show", "shaded")
    assert "points to version 2 itself" in call("shadow", "shaded", "2", code=1)
    assert "shaded@default: no shadow" in call("shadow", "shaded", "--off")
    assert "shadow of" not in call("show", "shaded")
    assert "deleted shaded@1, shaded@2" in call("rm", "shaded", "--force")


def test_a_shadow_line_says_how_it_does() -> None:
    tally: dict[str, object] = {"version": 4, "percent": 10, "compared": 200, "agreement": 0.985}
    said = tables.shadow("default", {**tally, "errors": {"adapter_refused": 1}, "dropped": {"no_room": 2}})
    assert said == (
        "shadow of default: version 4 gets 10 %; 200 compared, 98.5 % agree; errors: 1 adapter_refused; "
        "dropped: 2 no_room"
    )


def test_an_archive_that_is_not_promoted(call: Call, directory: Callable[[int], str], tmp_path: Path) -> None:
    call("push", directory(1), "--name", "a")
    archive = tmp_path / "adapter.tar.gz"
    archive.write_bytes(tar(adapter_files(2).files()))
    assert re.search(r"a@2\n(.*\n)* +aliases +none", call("push", str(archive), "--name", "a", "--no-promote"))


def test_what_was_pushed_is_pulled(call: Call, directory: Callable[[int], str], tmp_path: Path) -> None:
    call("push", directory(1), "--name", "pulled")
    call("push", directory(2), "--name", "pulled")
    target = tmp_path / "pulled"
    assert re.search(r"pulled@1 in /.*/pulled\n", call("pull", "pulled@1", str(target)))
    assert {path.name: path.read_bytes() for path in target.iterdir()} == adapter_files(1).files()
    assert "which was there already" in call("pull", "pulled@1", str(target))
    assert "is not empty and holds something else" in call("pull", "pulled", str(target), code=1)
    assert "there is no adapter 'b'" in call("pull", "b", str(tmp_path / "b"), code=1)
    assert not (tmp_path / "b").exists()
    assert json.loads(call("pull", "pulled", str(tmp_path / "c"), "--json"))["version"] == 2


def test_old_versions_and_damage(call: Call, directory: Callable[[int], str]) -> None:
    for seed in (1, 2, 3):
        call("push", directory(seed), "--name", "old")
    assert re.search(r"would be deleted:\n.*\n +old@1 +ready", call("gc", "old", "--keep", "1", "--dry-run"))
    assert re.search(r"deleted:\n.*\n +old@1 +ready", call("gc", "old", "--keep", "1"))
    assert "kept, one of the newest that are kept, or newer than one of them: old@2, old@3" in call("gc", "old")
    assert "2 versions, 2 sets of files" in call("verify", "--repair")


def test_json_is_the_servers_answer_and_nothing_else(call: Call, directory: Callable[[int], str]) -> None:
    pushed = json.loads(call("push", directory(1), "--name", "json", "--json"))
    assert (pushed["name"], pushed["version"], pushed["created"]) == ("json", 1, True)
    listed = json.loads(call("list", "--json"))["data"]
    assert [adapter["name"] for adapter in listed] == ["json"]
    assert (listed[0]["version_count"], listed[0]["states"]) == (1, {"ready": 1})
    shown = json.loads(call("show", "json", "--json"))
    assert [version["version"] for version in shown["versions"]] == [1]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["show", "b"], "there is no adapter 'b'; registered: none (not_found)"),
        (["show", "../../x"], "adapter name '../../x' is not allowed"),
        (["show", ""], "adapter name '' is not allowed"),
        (["rollback", "b"], "there is no adapter 'b'"),
        (["promote", "b", "1"], "there is no adapter 'b'"),
        (["rm", "b@1"], "there is no adapter 'b'"),
        (["push", "/nowhere", "--name", "b"], "/nowhere does not exist; give a directory"),
        (["list", "--server", "localhost:1"], "did not answer"),
    ],
)
def test_what_cannot_be_done_says_why_and_exits_1(call: Call, words: list[str], complaint: str) -> None:
    assert complaint in call(*words, code=1)


def test_a_refused_upload_says_what_the_gate_says(call: Call, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "the upload has no adapter_model.safetensors" in call("push", str(tmp_path), "--name", "a", code=1)


def test_a_server_that_is_down(call: Call) -> None:
    said = call("list", "--server", f"http://127.0.0.1:{free_port()}", code=1)
    assert "check the address and that the server is up" in said


@pytest.mark.parametrize(
    "words", [[], ["fly"], ["push", "x"], ["promote", "a", "x"], ["split", "a", "1"], ["gc", "--keep", "0"]]
)
def test_wrongly_called_exits_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["adapters", *words])
    assert ended.value.code == 2
    assert "usage: loraplex adapters" in capsys.readouterr().err
