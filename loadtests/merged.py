"""Does a merged engine cost anything? `python -m loadtests.merged`

Three ways to the same shape of work, by turns in one run, through the same front-end: the bare base with LoRA off and
in the merged engine's type (loadtests/rivals/bare_base.py), one adapter merged into an engine of its own, and one
through the LoRA path of the same server. Tokens a second of decoding and the time to the first token at each number of
clients, and the ratios merged / bare (what is meant to be 1) and merged / LoRA (the gain).

The server's base engine is unquantised, so that all three have one type; with `--quantization nf4` its LoRA path is the
4-bit one that is served by default.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from adapters.base import BaseModel
from loadtests.base import add_base, chosen_base
from loadtests.figures import Figures, Slo, ratio
from loadtests.generator import LoadGenerator
from loadtests.scenarios import PROMPT
from loadtests.servers import START_TIMEOUT_S, upload
from loadtests.synthetic import write_adapter
from loadtests.trace import Lengths, Workload, make_trace
from server.launch import ServerProcess, free_port, launch, start

MERGED, LORA = "promoted", "swapped"
"""The two adapters."""
RANK = 8
BUILD_S = 600
MEASURES: dict[str, Callable[[Figures], float]] = {
    "decode tokens/s": lambda figures: figures.decode_tokens_per_s,
    "tokens/s": lambda figures: figures.output_tokens_per_s,
    "TTFT ms": lambda figures: 1e3 * figures.ttft_s.p50,
}
ANY = Slo(1e9, 1e9)


@dataclass(frozen=True)
class Way:
    name: str
    url: str
    model: str


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.merged", description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 16], help="at once (default: 1 8 16)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer (default: 64)")
    parser.add_argument("--repetitions", type=int, default=8, help="of each (default: 8)")
    parser.add_argument("--quantization", choices=("none", "nf4"), default="none", help="of the base engine")
    parser.add_argument("--flag", action="append", default=[], help="for both servers, as --flag=--compile")
    add_base(parser)
    arguments = parser.parse_args(argv)
    base = chosen_base(arguments)
    with tempfile.TemporaryDirectory() as directory, _servers(base, Path(directory), arguments) as ways:
        found = _measure(base, ways, arguments)
    _print(found)
    return 0


@contextmanager
def _servers(base: BaseModel, scratch: Path, arguments: argparse.Namespace) -> Iterator[list[Way]]:
    flags = ["--model", str(base.path), "--served-model-name", base.name, *arguments.flag]
    ours = [*flags, "--data-dir", str(scratch / "ours"), "--quantization", arguments.quantization]
    ours += ["--merge-probe-tokens", "128"]
    with (
        launch(ours, scratch / "ours.log") as server,
        _bare([*flags, "--data-dir", str(scratch / "bare")], scratch) as bare,
    ):
        for each in (server, bare):
            each.wait_ready(START_TIMEOUT_S)
        adapters = {
            name: write_adapter(scratch / name, base, rank=RANK, seed=seed) for seed, name in enumerate((MERGED, LORA))
        }
        upload(server.url, adapters)
        _promote(server.url)
        yield [Way("bare", bare.url, base.name), Way("merged", server.url, MERGED), Way("LoRA", server.url, LORA)]


def _bare(flags: list[str], scratch: Path) -> ServerProcess:
    port = free_port()
    command = [sys.executable, "-m", "loadtests.rivals.bare_base", "--port", str(port), *flags]
    return start([*command, "--quantization", "none"], f"http://127.0.0.1:{port}", scratch / "bare.log")


def _promote(url: str) -> None:
    with httpx.Client(base_url=url, timeout=BUILD_S + 60, trust_env=False) as client:
        path = f"/v1/adapters/{MERGED}/versions/1/merged"
        job = client.put(path, params={"wait_s": BUILD_S}, json={"accept_loss": True}).raise_for_status().json()
        if job["state"] != "succeeded":
            raise SystemExit(f"there is no merged engine: {job}")
        body = {"model": MERGED, "prompt": "one", "max_tokens": 1}
        way = client.post("/v1/completions", json=body).raise_for_status().headers["x-loraplex-path"]
        if way != "merged":
            raise SystemExit(f"requests take the path {way!r}, not the merged engine")


Measured = dict[int, dict[str, list[Figures]]]
"""Clients → way → a figure for each repetition."""


def _measure(base: BaseModel, ways: list[Way], arguments: argparse.Namespace) -> Measured:
    found: Measured = {clients: {way.name: [] for way in ways} for clients in arguments.clients}
    with LoadGenerator(base.path, quiet=True) as generator:
        for way in ways:
            generator.replay(make_trace(_wave(way.model, max(arguments.clients), arguments.tokens), 0), way.url)
        rounds = range(1, arguments.repetitions + 1)
        for number in track(rounds, "measuring", console=Console(file=sys.stderr)):
            for clients in arguments.clients:
                for way in ways if number % 2 else reversed(ways):  # who comes first has no advantage
                    trace = make_trace(_wave(way.model, clients, arguments.tokens), number)
                    found[clients][way.name].append(Figures.of(generator.replay(trace, way.url), ANY))
    return found


def _wave(model: str, clients: int, tokens: int) -> Workload:
    return Workload((model,), clients, PROMPT, Lengths(tokens, tokens), concurrency=clients)


def _print(found: Measured) -> None:
    table = Table(title="medians; ratios with their 95 % confidence intervals")
    for heading in ("clients", "measure", "bare", "merged", "LoRA", "merged / bare", "merged / LoRA"):
        table.add_column(heading, justify="left" if heading == "measure" else "right")
    for clients, by_way in found.items():
        for name, measure in MEASURES.items():
            values = {way: [measure(each) for each in figures] for way, figures in by_way.items()}
            medians = [f"{median(values[way]):.1f}" for way in ("bare", "merged", "LoRA")]
            ratios = [_shown(values["merged"], values[way]) for way in ("bare", "LoRA")]
            table.add_row(str(clients), name, *medians, *ratios)
    Console().print(table)


def _shown(some: list[float], others: list[float]) -> str:
    found = ratio(some, others)
    return f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})"


if __name__ == "__main__":
    sys.exit(main())
