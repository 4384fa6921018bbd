"""The whole comparison, with servers that need no model; and the page that comes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtests import servers
from loadtests.__main__ import main
from loadtests.scenarios import SUITES, Dials
from loadtests.servers import Setup
from server.launch import ServerProcess, launch


def _fake(name: str, setup: Setup) -> ServerProcess:
    flags = ["--engine", "fake", "--model", str(setup.base.path), "--served-model-name", setup.base.name]
    return launch([*flags, "--data-dir", str(setup.scratch / name)], setup.scratch / f"{name}.log")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "SERVERS", {**servers.SERVERS, "ours-one": _fake, "ours-two": _fake})
    monkeypatch.setattr("loadtests.__main__.SERVERS", servers.SERVERS)


@pytest.mark.usefixtures("fakes")
def test_servers_without_adapters_are_asked_for_the_base_only(demo_base: Path, tmp_path: Path) -> None:
    flags = ["--suite", "base", "--servers", "ours-one,ours-two", "--repetitions", "2", "--tokens", "4"]
    flags += ["--model", str(demo_base), "--data-dir", str(tmp_path / "data"), "--report", str(tmp_path / "report")]
    assert main(flags) == 0
    result = json.loads((tmp_path / "report" / "results.json").read_text())
    assert len(result["rows"]) == 3
    outcomes = [one for server in result["servers"] for each in server["outcomes"].values() for one in each[0]]
    assert {one["model"] for one in outcomes} == {demo_base.name}


@pytest.mark.usefixtures("fakes")
def test_two_servers_under_the_same_traces(demo_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--servers",
        "ours-one,ours-two",
        "--repetitions",
        "2",
        "--tokens",
        "4",
        "--suite",
        "fairness",
        "--only",
        "quiet,flooded",
    ]
    flags += ["--rate", "40", "--model", str(demo_base), "--data-dir", str(tmp_path / "data")]

    assert main([*flags, "--report", str(tmp_path / "report")]) == 0

    assert "ours-two: ready after" in capsys.readouterr().out
    result = json.loads((tmp_path / "report" / "results.json").read_text())
    expected = [scenario.title for scenario in SUITES["fairness"](Dials("base", [str(n) for n in range(8)], 4, 40.0))]
    assert [row["title"] for row in result["rows"]] == expected
    for row in result["rows"]:
        assert set(row["figures"]) == {"ours-one", "ours-two"}
        low, mean, high = (row["ratios"]["ours-two"][name] for name in ("low", "mean", "high"))
        assert 0 < low <= mean <= high
    first, second = (
        [(one["model"], one["input_tokens"], one["output_tokens"]) for one in server["outcomes"]["flooded"][0]]
        for server in result["servers"]
    )
    assert first == second, "both were asked the same"
    assert all(server["memory_mb"] > 10 and server["ready_s"] > 0 for server in result["servers"])
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("<img") == 3  # the comparison, and one for each scenario with traffic of its own
    assert "--suite fairness" in page
    assert "quiet adapter beside a flood / alone" in page


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--servers", "ours,theirs"], "unknown server 'theirs'"),
        (["--adapters", "3"], "at least 8"),
        (["--only", "base-1,base-2"], "base-1, base-8, adapter-1"),
        (["--ranks", "8,64"], "expected 1 to 16"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(
    flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(flags)

    assert complaint in capsys.readouterr().err


def test_a_server_that_does_not_start_ends_the_comparison_with_its_log(
    demo_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str, setup: Setup) -> ServerProcess:
        return launch(["--no-such-flag"], setup.scratch / "broken.log")

    monkeypatch.setattr(servers, "SERVERS", {**servers.SERVERS, "ours": broken})

    assert main(["--servers", "ours", "--model", str(demo_base), "--data-dir", str(tmp_path)]) == 1

    assert "no-such-flag" in capsys.readouterr().err
