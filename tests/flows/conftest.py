"""Real servers that flows share, vLLM on the CPU: the NF4 demo base with two adapter slots and three resident adapters;
its values in fp32; and a base in fp32 beside which a merged engine has room."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.base import BaseModel
from adapters.nf4 import repair_dequantize
from loadtests.synthetic import write_adapter
from server.launch import launch
from tests.flows.live import KEY, Live

FLAGS = ["--max-loras", "2", "--max-resident-adapters", "3", "--kv-cache-memory-bytes", "500000000"]
BESIDE = [*("--quantization", "none"), *("--dtype", "float32"), *("--max-loras", "2"), *("--max-num-seqs", "8")]
BESIDE += [*("--kv-cache-memory-bytes", "300000000"), *("--memory-reserve-bytes", "0"), *("--merge-probe-tokens", "64")]
BESIDE += [*("--promotion", "auto"), *("--promotion-window-s", "10"), *("--promotion-min-life-s", "1")]
BESIDE += [*("--promotion-requests", "8"), *("--promotion-tokens-per-minute", "12000")]  # a crowd of long prompts
BESIDE += ["--promotion-speedup", "0"]  # kept whatever it gains: that differs from day to day
DEMO_ADAPTERS = ("pirate", "ticket")


@pytest.fixture(scope="session")
def base(demo_base: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return BaseModel.read(demo_base, cache_dir=tmp_path_factory.mktemp("fingerprints"))


@pytest.fixture(scope="session")
def demo_adapters(demo_base: Path) -> dict[str, Path]:
    """The two adapters of the demo, trained by the command the README gives; kept in the cache between sessions."""
    cache = demo_base.parent.parent / "demo-adapters"
    for name in DEMO_ADAPTERS:
        if not (cache / name / "adapter_model.safetensors").exists():
            command = [sys.executable, "-m", "adapters.train", "run", f"adapters/train/demo/{name}.yaml"]
            command += ["--set", f"model.model_name_or_path={demo_base}", "--set", f"output.output_dir={cache / name}"]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return {name: cache / name for name in DEMO_ADAPTERS}


@pytest.fixture(scope="session")
def random_adapters(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of different ranks that change every answer strongly."""
    root = tmp_path_factory.mktemp("random")
    return {f"random{rank}": write_adapter(root / str(rank), base, rank=rank, seed=rank) for rank in (4, 8, 16)}


@pytest.fixture(scope="session")
def live(
    base: BaseModel,
    demo_adapters: dict[str, Path],
    random_adapters: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("live")
    flags = ["--model", str(base.path), "--data-dir", str(root / "data"), f"--api-keys=admin:{KEY}", *FLAGS]
    with launch(flags, root / "server.log") as server:
        server.wait_ready()
        running = Live(server, base)
        for name, path in (demo_adapters | random_adapters).items():
            response = running.upload(name, path)
            assert response.status_code == 201, response.text
        yield running


def write_nf4_values(base: BaseModel, directory: Path) -> Path:
    """The base with every linear weight rounded to NF4 and back, all in fp32."""
    import torch
    from bitsandbytes import functional
    from safetensors.torch import load_file, save_file

    repair_dequantize()
    shutil.copytree(base.path, directory)
    tensors = {name: tensor.float() for name, tensor in load_file(directory / "model.safetensors").items()}
    for module in base.modules:
        weight = tensors[f"{module}.weight"]
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        tensors[f"{module}.weight"] = functional.dequantize_4bit(packed, state).to(torch.float32)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="session")
def adapters(demo_adapters: dict[str, Path], random_adapters: dict[str, Path]) -> dict[str, Path]:
    return demo_adapters | random_adapters


@pytest.fixture(scope="session")
def exact(base: BaseModel, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The values of the NF4 base, served in fp32. The adapters come without the note which base they belong to."""
    root = tmp_path_factory.mktemp("fp32")
    model = write_nf4_values(base, root / "base")
    flags = ["--model", str(model), "--data-dir", str(root / "data"), f"--api-keys=admin:{KEY}"]
    with launch([*flags, "--quantization", "none", "--dtype", "float32", "--max-loras", "2"], root / "log") as server:
        server.wait_ready()
        running = Live(server, BaseModel.read(model))
        for name, path in adapters.items():
            bare = shutil.copytree(path, root / name, ignore=shutil.ignore_patterns("loraplex.json"))
            assert running.upload(name, bare).status_code == 201
        yield running


@pytest.fixture(scope="session")
def beside(base: BaseModel, demo_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The 16-bit base in fp32, with room for a merged engine beside it: by hand, or where a crowd asks for pirate."""
    root = tmp_path_factory.mktemp("beside")
    flags = ["--model", str(base.path), "--data-dir", str(root / "data"), f"--api-keys=admin:{KEY}", *BESIDE]
    with launch(flags, root / "server.log") as server:
        server.wait_ready()
        running = Live(server, base)
        assert running.upload("pirate", demo_adapters["pirate"]).status_code == 201
        yield running
