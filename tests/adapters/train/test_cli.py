import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
import pytest

from adapters.errors import NotServable, TrainError
from adapters.train.cli import EXIT_CODES, main
from adapters.train.handover import upload


def test_a_bad_configuration_exits_2(write_yaml: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(write_yaml()), "--set", "training.max_step=1"]) == 2
    assert "training.max_steps" in capsys.readouterr().err


def test_a_base_that_is_not_there_exits_2(write_yaml: Callable[..., Path]) -> None:
    assert main(["run", str(write_yaml()), "--set", "model.model_name_or_path=absent"]) == 2


def test_bad_data_exits_3_and_leaves_nothing(write_yaml: Callable[..., Path]) -> None:
    path = write_yaml()
    (path.parent / "rows.jsonl").write_text("{}\n")
    assert main(["run", str(path)]) == 3
    assert not (path.parent / "out").exists()


def test_check_shows_numbers_and_what_is_trained(
    write_yaml: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_yaml(data={"train": ["rows.jsonl", "more.jsonl"], "on_error": "skip"})
    (path.parent / "more.jsonl").write_text('{"instruction": "Why?", "output": "[b]For gold[/b]"}\n{\n')
    assert main(["check", str(path), "--show", "9"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"rows +3 trained, 2 held out", shown)
    assert "⟦[b]For gold[/b]<|im_end|>⟧" in shown
    assert re.search(r"left out: .*more.jsonl:2: not valid JSON", shown)
    assert not (path.parent / "out").exists()


def test_a_rank_above_the_servers_limit_exits_6_and_keeps_the_adapter(write_yaml: Callable[..., Path]) -> None:
    path = write_yaml(peft={"r": 32})
    assert main(["run", str(path)]) == 6
    assert (path.parent / "out" / "adapter_model.safetensors").is_file()


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[httpx.Request]]:
    """A server that gives one answer; what it was sent is kept."""

    def install(status: int, body: object) -> list[httpx.Request]:
        seen: list[httpx.Request] = []

        def handle(request: httpx.Request) -> httpx.Response:
            request.read()
            seen.append(request)
            return httpx.Response(status, json=body)

        monkeypatch.setattr(httpx, "Client", partial(httpx.Client, transport=httpx.MockTransport(handle)))
        return seen

    return install


def test_an_upload_sends_name_files_and_key(tmp_path: Path, answering: Callable[..., list[httpx.Request]]) -> None:
    seen = answering(201, {"name": "sailor", "version": 1, "state": "ready"})
    (tmp_path / "adapter_config.json").write_text("{}")
    assert upload(tmp_path, "sailor", "salty", "http://server/", "secret")["version"] == 1
    assert str(seen[0].url) == "http://server/v1/adapters"
    assert seen[0].headers["authorization"] == "Bearer secret"
    for part in (b'name="name"', b"sailor", b'name="files"; filename="adapter_config.json"'):
        assert part in seen[0].content


@pytest.mark.parametrize(("status", "error"), [(422, NotServable), (401, TrainError), (503, TrainError)])
def test_a_refusal_passes_the_servers_message_on(
    tmp_path: Path, answering: Callable[..., list[httpx.Request]], status: int, error: type[TrainError]
) -> None:
    answering(status, {"error": {"message": "rank 99 is too large"}})
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(TrainError, match="rank 99 is too large") as caught:
        upload(tmp_path, "sailor", "", "http://server", None)
    assert type(caught.value) is error


def test_a_run_that_diverges_exits_5_and_leaves_nothing(write_yaml: Callable[..., Path]) -> None:
    path = write_yaml(training={"learning_rate": 1e30, "warmup_steps": 0, "max_grad_norm": 1e30})
    assert main(["run", str(path)]) == 5
    assert not (path.parent / "out").exists()


def test_every_exit_code_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert [code for _, code, meaning in EXIT_CODES if f"{code} {meaning}" not in told] == []
    assert [code for _, code, _ in EXIT_CODES] == [2, 3, 4, 5, 6, 7]


def test_a_dry_run_checks_estimates_shows_a_sample_and_trains_nothing(
    write_yaml: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_yaml()
    before = sorted(path.parent.iterdir())
    assert main(["run", str(path), "--dry-run"]) == 0
    told = capsys.readouterr().out
    for said in ("rows ", "⟦", "optimizer states", "parameters"):
        assert said in told
    assert sorted(path.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("spoil", "code"), [(["--set", "peft.q=1"], 2), (["--set", "data.max_length=16"], 3), (["--memory", "1MB"], 4)]
)
def test_a_dry_run_ends_as_the_run_would(write_yaml: Callable[..., Path], spoil: list[str], code: int) -> None:
    path = write_yaml()
    assert main(["run", str(path), "--dry-run", *spoil]) == code
