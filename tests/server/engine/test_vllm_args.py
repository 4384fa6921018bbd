"""Settings into vLLM's arguments and environment. That vLLM knows the arguments is tested with its names."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.engine import vllm_args
from server.errors import SettingsError
from server.settings import Settings


@pytest.fixture(autouse=True)
def _environment_as_before() -> Iterator[None]:
    before = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING", "LORAPLEX_STEP_THREADS", "CXX"):
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)


def flags(**given: Any) -> dict[str, str]:
    """The last value of each flag, as argparse takes it."""
    words = vllm_args.command_line(Settings(**given), Path("base"), "base", ["q_proj"])
    return {word: following for word, following in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}


def prepared(monkeypatch: pytest.MonkeyPatch, cores: int, **given: Any) -> dict[str, str]:
    monkeypatch.setattr(vllm_args, "physical_cores", lambda: cores)
    vllm_args.prepare_environment(Settings(**given))
    return dict(os.environ)


@pytest.mark.parametrize(("cores", "given", "short"), [(1, None, "1"), (2, None, "1"), (8, None, "7"), (8, 8, "8")])
def test_short_steps_leave_a_core_to_the_server(
    monkeypatch: pytest.MonkeyPatch, cores: int, given: int | None, short: str
) -> None:
    environment = prepared(monkeypatch, cores, cpu_threads=given)
    assert environment["OMP_NUM_THREADS"] == str(cores)
    assert environment["LORAPLEX_STEP_THREADS"] == short


def test_one_process_schedules_and_computes_unless_the_model_is_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flags()["--distributed-executor-backend"] == "uni"
    assert prepared(monkeypatch, 2)["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    for spread in ("--tensor-parallel-size=2", "--distributed-executor-backend=mp"):
        assert flags(engine_args=(spread,)).get("--distributed-executor-backend") != "uni"
    os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in prepared(monkeypatch, 2, engine_args=("-tp=2",))
    assert "--distributed-executor-backend" not in flags(device="cuda")


def test_compiled_by_default_on_cuda_only() -> None:
    assert "--enforce-eager" in flags()
    assert "--enforce-eager" not in flags(compile=True)
    assert "--enforce-eager" not in flags(device="cuda")
    assert "--enforce-eager" in flags(device="cuda", compile=False)


def test_the_slots_go_round_and_newcomers_have_places_of_their_own() -> None:
    given = flags(adapter_turn_s=0.5, max_num_seqs=16)
    assert given["--scheduler-cls"] == "server.vllm_plugin.scheduler.RotatingScheduler"
    assert json.loads(given["--additional-config"]) == {"adapter_turn_s": 0.5, "sequences": 16}
    assert given["--max-num-seqs"] == "18"
    cuda = flags(device="cuda", max_num_seqs=16)
    assert "--scheduler-cls" not in cuda
    assert cuda["--max-num-seqs"] == "16"


def test_compiling_without_a_compiler_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    prepared(monkeypatch, 2)
    with pytest.raises(SettingsError, match=r"no C\+\+ compiler \(no-such-compiler\)"):
        prepared(monkeypatch, 2, compile=True)


def test_compiling_for_a_processor_without_bf16_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.processor.multiplies_bf16", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: name)
    with pytest.raises(SettingsError, match="no bf16 instructions"):
        prepared(monkeypatch, 2, compile=True)


@pytest.mark.parametrize("name", ["TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR"])
def test_what_is_compiled_is_kept_in_the_data_directory(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(name, raising=False)
    assert prepared(monkeypatch, 2, data_dir=tmp_path)[name] == str(tmp_path / "compiled")


def merged_flags(directory: Path, share: float | None = None, **given: Any) -> dict[str, str]:
    words = vllm_args.merged_command_line(Settings(**given), directory, "a@0123456789ab", share)
    return {word: following for word, following in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}


def test_a_merged_engine_is_the_base_engine_without_lora(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    base, merged = flags(max_num_seqs=8), merged_flags(tmp_path, max_num_seqs=8)
    assert [flag for flag in merged if "lora" in flag] == []
    assert not {"--scheduler-cls", "--additional-config", "--quantization"} & merged.keys()
    assert (merged["--model"], merged["--served-model-name"]) == (str(tmp_path), "a@0123456789ab")
    assert merged["--max-num-seqs"] == "8"
    same = ("--dtype", "--max-model-len", "--tool-call-parser", "--structured-outputs-config", "--enforce-eager")
    assert {flag: merged[flag] for flag in same} == {flag: base[flag] for flag in same}


def test_the_memory_of_a_merged_engine_is_what_was_planned(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {}}')
    merged = merged_flags(tmp_path, 0.25, device="cuda", merged_kv_cache_memory_bytes=7)
    assert (merged["--kv-cache-memory-bytes"], merged["--gpu-memory-utilization"]) == ("7", "0.25")
    assert merged["--quantization"] == "bitsandbytes"
    assert "--gpu-memory-utilization" not in merged_flags(tmp_path)
