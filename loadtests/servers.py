"""The servers that are compared, each ready to start with the same base, adapters and engine flags.

ours            `loraplex serve`, adapters uploaded over HTTP
ours-tuned      the same, told to compute on every core, and compiled where that can be
ours-front-end  ours on the engine as stock runs it, without our plugin: what the front-end costs (answers may be wrong)
stock           vLLM's own server without our plugin, adapters from --lora-modules
stock-tuned     the same, told to compute on every core
llama-cpp       llama.cpp with the GGUF of the demo base, base only (loadtests/rivals/llama_cpp_server.py)
peft            transformers + PEFT behind a small server, one request at a time (loadtests/rivals/peft_server.py)
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from rich.progress import track

from adapters.base import BaseModel
from adapters.demo_base import find_gguf
from adapters.processor import multiplies_bf16
from server.engine import vllm_args
from server.launch import ServerProcess, free_port, launch, start
from server.settings import Settings

START_TIMEOUT_S = 900


@dataclass(frozen=True)
class Setup:
    """What every server of a comparison is given."""

    base: BaseModel
    adapters: Mapping[str, Path]
    max_loras: int
    scratch: Path

    @property
    def settings(self) -> Settings:
        return Settings(model=str(self.base.path), served_model_name=self.base.name, max_loras=self.max_loras)


@dataclass(frozen=True)
class Running:
    """A server that can generate and knows every adapter."""

    process: ServerProcess
    ready_s: float

    @property
    def url(self) -> str:
        return self.process.url

    @property
    def memory_mb(self) -> float:
        """Proportional set size of all its processes: shared pages are counted once."""
        root = psutil.Process(self.process.process.pid)
        return sum(float(each.memory_full_info().pss) for each in [root, *root.children(recursive=True)]) / 1e6


@contextmanager
def running(name: str, setup: Setup) -> Iterator[Running]:
    """Start the server called `name`, wait until it can generate, hand it its adapters; stop it at the end."""
    with SERVERS[name](name, setup) as process:
        ready_s = process.wait_ready(START_TIMEOUT_S)
        if name.startswith("ours"):
            upload(process.url, setup.adapters)
        yield Running(process, ready_s)


def upload(url: str, adapters: Mapping[str, Path]) -> None:
    """Register every adapter of `adapters` under its name."""
    names = list(adapters)
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        for name in track(names, description="uploading adapters") if len(names) > 20 else names:
            files = [("files", (file.name, file.read_bytes())) for file in sorted(adapters[name].iterdir())]
            client.post("/v1/adapters", data={"name": name}, files=files).raise_for_status()


def every_core() -> str:
    """All cores this process may use, as vLLM writes it."""
    cores = sorted(os.sched_getaffinity(0))
    return ",".join(str(core) for core in cores)


def _ours(name: str, setup: Setup) -> ServerProcess:
    arguments = ["--model", str(setup.base.path), "--served-model-name", setup.base.name]
    arguments += ["--max-loras", str(setup.max_loras), "--data-dir", str(setup.scratch / f"{name}-data")]
    if name == "ours-tuned":
        arguments += ["--cpu-threads", str(len(os.sched_getaffinity(0)))]
        if multiplies_bf16() and shutil.which(os.environ.get("CXX", "g++")):
            arguments.append("--compile")
    if name == "ours-front-end":
        arguments += ["--engine-args=--distributed-executor-backend=mp"]
    environment = {"LORAPLEX_PLUGIN": "off"} if name == "ours-front-end" else {}
    return launch(arguments, setup.scratch / f"{name}.log", env=environment)


def _stock(name: str, setup: Setup) -> ServerProcess:
    port = free_port()
    targets = {module.rpartition(".")[2] for module in setup.base.modules}
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--host", "127.0.0.1"]
    command += ["--port", str(port)]
    command += vllm_args.served(setup.settings, setup.base.path, setup.base.name, targets)
    command += ["--lora-modules", *(f"{adapter}={path}" for adapter, path in setup.adapters.items())]
    environment = {"LORAPLEX_PLUGIN": "off", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if name == "stock-tuned":
        environment["VLLM_CPU_OMP_THREADS_BIND"] = every_core()
    server = start(command, f"http://127.0.0.1:{port}", setup.scratch / f"{name}.log", env=environment)
    server.ready_path = "/health"
    return server


def _llama_cpp(name: str, setup: Setup) -> ServerProcess:
    port = free_port()
    command = [sys.executable, "-m", "loadtests.rivals.llama_cpp_server", "--port", str(port)]
    command += ["--gguf", str(find_gguf()), "--name", setup.base.name, "--threads", str(len(os.sched_getaffinity(0)))]
    server = start(command, f"http://127.0.0.1:{port}", setup.scratch / f"{name}.log")
    server.ready_path = "/health"
    return server


def _peft(name: str, setup: Setup) -> ServerProcess:
    port = free_port()
    command = [sys.executable, "-m", "loadtests.rivals.peft_server", "--port", str(port)]
    command += ["--model", str(setup.base.path), "--name", setup.base.name]
    command += [f"{adapter}={path}" for adapter, path in setup.adapters.items()]
    server = start(command, f"http://127.0.0.1:{port}", setup.scratch / f"{name}.log")
    server.ready_path = "/health"
    return server


SERVERS: Mapping[str, Callable[[str, Setup], ServerProcess]] = {
    "ours": _ours,
    "ours-tuned": _ours,
    "ours-front-end": _ours,
    "stock": _stock,
    "stock-tuned": _stock,
    "llama-cpp": _llama_cpp,
    "peft": _peft,
}
