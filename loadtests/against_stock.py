"""Ours against stock vLLM's own server: same base, same adapters, same engine flags, one after the other in one run.

    python -m loadtests.against_stock [--tokens 64] [--repetitions 3] [--model DIR]

Prints a table of medians and ratios (ours / stock) and writes nothing. Stock runs without our vLLM plugin.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from adapters.base import BaseModel
from loadtests.client import wave
from loadtests.synthetic import write_adapter
from server.base import find_base
from server.engine import vllm_args
from server.launch import ServerProcess, free_port, launch, start
from server.settings import Settings

NAMES = ("one", "two", "three")


@dataclass(frozen=True)
class Case:
    title: str
    models: tuple[str, ...]


@dataclass(frozen=True)
class Figures:
    """Of one server: seconds to ready, resident memory of all its processes, and per case (tokens/s, TTFT s)."""

    ready_s: float
    memory_mb: float
    cases: dict[str, tuple[float, float]]
    cold_ttft_s: float | None


def cases(base: str) -> list[Case]:
    one, two, three = NAMES
    return [
        Case("base, 1 request", (base,)),
        Case("base, 8 requests", (base,) * 8),
        Case("one adapter, 1 request", (one,)),
        Case("one adapter, 8 requests", (one,) * 8),
        Case("3 adapters + base, 8 requests", (one, two, three, base) * 2),
    ]


def main() -> int:
    arguments = _arguments()
    settings = Settings(model=arguments.model, data_dir=arguments.data_dir, max_loras=4)
    base = find_base(settings)
    with tempfile.TemporaryDirectory() as scratch:
        adapters = {
            name: write_adapter(Path(scratch) / name, base, rank=8, seed=seed) for seed, name in enumerate(NAMES)
        }
        stock = measure(_stock(settings, base, adapters, Path(scratch)), base, {}, arguments)
        ours = measure(_ours(settings, base, Path(scratch)), base, adapters, arguments)
    _print(stock, ours, arguments)
    return 0


def measure(server: ServerProcess, base: BaseModel, uploads: dict[str, Path], arguments: argparse.Namespace) -> Figures:
    """Start-up, then the first request of each uploaded adapter, then every case: one warm-up, then the median."""
    with server:
        ready_s = server.wait_ready()
        asyncio.run(wave(server.url, [base.name], 8))
        cold = [_first_request(server.url, name, path) for name, path in uploads.items()]
        found = {}
        for case in track(cases(base.name), description=server.log.stem):
            found[case.title] = asyncio.run(_repeat(server.url, case, arguments))
        return Figures(ready_s, _memory_mb(server), found, statistics.median(cold) if cold else None)


async def _repeat(url: str, case: Case, arguments: argparse.Namespace) -> tuple[float, float]:
    await wave(url, case.models, arguments.tokens)
    waves = [await wave(url, case.models, arguments.tokens) for _ in range(arguments.repetitions)]
    return (
        statistics.median(done.tokens_per_s for done in waves),
        statistics.median(done.worst_ttft_s for done in waves),
    )


def _first_request(url: str, name: str, path: Path) -> float:
    with httpx.Client(timeout=120, trust_env=False) as client:
        files = [("files", (file.name, file.read_bytes())) for file in sorted(path.iterdir())]
        client.post(f"{url}/v1/adapters", data={"name": name}, files=files).raise_for_status()
    return asyncio.run(wave(url, [name], 8)).worst_ttft_s


def _engine_flags(settings: Settings, base: BaseModel) -> list[str]:
    targets = {module.rpartition(".")[2] for module in base.modules}
    return vllm_args.command_line(settings, base.path, base.name, targets)


def _stock(settings: Settings, base: BaseModel, adapters: dict[str, Path], scratch: Path) -> ServerProcess:
    port = free_port()
    modules = [f"{name}={path}" for name, path in adapters.items()]
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--host", "127.0.0.1"]
    command += ["--port", str(port), *_engine_flags(settings, base), "--lora-modules", *modules]
    environment = {"LORAPLEX_PLUGIN": "off", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    server = start(command, f"http://127.0.0.1:{port}", scratch / "stock.log", env=environment)
    server.ready_path = "/health"
    return server


def _ours(settings: Settings, base: BaseModel, scratch: Path) -> ServerProcess:
    arguments = ["--model", str(base.path), "--served-model-name", base.name]
    arguments += ["--max-loras", str(settings.max_loras), "--data-dir", str(scratch / "data")]
    return launch(arguments, scratch / "ours.log")


def _memory_mb(server: ServerProcess) -> float:
    """Proportional set size of the process tree: shared pages are counted once."""
    root = psutil.Process(server.process.pid)
    return sum(float(each.memory_full_info().pss) for each in [root, *root.children(recursive=True)]) / 1e6


def _print(stock: Figures, ours: Figures, arguments: argparse.Namespace) -> None:
    table = Table(title=f"{arguments.tokens} tokens a request, median of {arguments.repetitions} waves")
    for heading in ("case", "stock tok/s", "ours tok/s", "ratio", "stock TTFT ms", "ours TTFT ms"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for title, (rate, ttft) in stock.cases.items():
        our_rate, our_ttft = ours.cases[title]
        row = (f"{rate:.1f}", f"{our_rate:.1f}", f"{our_rate / rate:.2f}", f"{1e3 * ttft:.0f}", f"{1e3 * our_ttft:.0f}")
        table.add_row(title, *row)
    console = Console()
    console.print(table)
    console.print(f"ready after: stock {stock.ready_s:.1f} s, ours {ours.ready_s:.1f} s")
    console.print(f"memory (PSS of all processes): stock {stock.memory_mb:.0f} MB, ours {ours.memory_mb:.0f} MB")
    assert ours.cold_ttft_s is not None
    console.print(f"ours, first request after an upload (median): {1e3 * ours.cold_ttft_s:.0f} ms TTFT")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="demo", help="base model directory (default: the demo base)")
    parser.add_argument("--data-dir", type=Path, default=Path(".loraplex"), help="where the demo base is kept")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--repetitions", type=int, default=3, help="counted waves of each case")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
