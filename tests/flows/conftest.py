"""One real server for all flows: vLLM on the CPU, the NF4 demo base, two adapter slots, three resident adapters."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.base import BaseModel
from loadtests.synthetic import write_adapter
from server.launch import launch
from tests.flows.live import KEY, Live

FLAGS = ["--max-loras", "2", "--max-resident-adapters", "3", "--kv-cache-memory-bytes", "500000000"]
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
