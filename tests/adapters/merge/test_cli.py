from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from adapters.merge.cli import EXIT_CODES, main
from server.cli import main as loraplex
from tests.adapters.merge.by_hand import Q, base_of_ones, rank_one, written


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Of a merge that is in order, of a base that is no model; what is measured: test_fidelity_cli.py."""
    base_of_ones(tmp_path)
    places = ["--base", str(tmp_path / "ones"), "--out", str(tmp_path / "out")]
    return [str(rank_one(tmp_path / "a")), *places, "--no-verify"]


def test_a_merge_says_what_it_does_and_does_it(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert loraplex(["merge", *words, "--from", "original", "--dtype", "float32"]) == 0
    assert load_file(tmp_path / "out/model.safetensors")[f"{Q}.weight"][0, 0] == 1.5
    told = capsys.readouterr()
    assert "W + ΔW" in told.out
    assert "original values of the base: asked for" in told.err


def test_a_dry_run_writes_nothing(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--dry-run"]) == 0
    assert "NF4 is what serves it here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_several_are_combined_on_the_way(words: list[str], tmp_path: Path) -> None:
    two = str(rank_one(tmp_path / "two", lora_alpha=2))
    assert main([two, *words, "--weights", "0.5", "1", "--from", "original"]) == 0
    assert load_file(tmp_path / "out/model.safetensors")[f"{Q}.weight"][0, 0] == 2
    record = json.loads((tmp_path / "out/loraplex-merge.json").read_text())
    assert record["adapter"]["name"] == "two+a"
    assert record["composed"]["composition"]["weights"] == [0.5, 1.0]
    assert len(record["composed"]["parents"]) == 2


def test_a_dry_run_of_several_writes_nothing_either(words: list[str], tmp_path: Path) -> None:
    two = str(rank_one(tmp_path / "two"))
    assert main([two, *words, "--as-adapter", "--dry-run"]) == main([two, *words, "--dry-run"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "ones", "two"]


def test_several_become_an_adapter(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = str(rank_one(tmp_path / "two"))
    assert main([two, *words, "--as-adapter", "--method", "ties", "--density", "1"]) == 0
    assert "a LoRA of 1 modules, rank 1" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "out/adapter_config.json").is_file()


@pytest.mark.parametrize(
    "more",
    [
        ["--weights", "1"],
        ["--as-adapter"],
        ["--density", "0.5"],
        ["--rank", "3"],
        ["--dtype", "int8"],
        ["--from", "nowhere"],
    ],
    ids=" ".join,
)
def test_wrong_words_end_with_2(words: list[str], more: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words, *more])
    assert ended.value.code == 2


def test_each_trouble_has_an_exit_code_of_its_own(words: list[str], tmp_path: Path) -> None:
    assert len({code for _, code, _ in EXIT_CODES} | {0, 1, 2, 130}) == len(EXIT_CODES) + 4
    (tmp_path / "a/adapter_config.json").write_text("{")
    assert main(words) == 3
    bias = {
        f"{Q}.lora_A.weight": np.ones((1, 8)),
        f"{Q}.lora_B.weight": np.ones((8, 1)),
        f"{Q}.lora_B.bias": np.ones(8),
    }
    words[0] = str(written(tmp_path / "biased", bias, r=1, lora_bias=True))
    assert main(words) == 4
    words[0] = str(rank_one(tmp_path / "large", lora_alpha=1e9))
    assert main([*words, "--dtype", "float16"]) == 5
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    assert main(words) == 6
    assert main([words[0], "--base", str(tmp_path), "--out", str(tmp_path / "new")]) == 1


def test_a_stop_is_no_failure(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("adapters.merge.cli.execute", stop)
    assert main(words) == 130
