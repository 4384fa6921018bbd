"""Does a merged engine cost anything? `python -m loadtests.merged`

Three ways to the same shape of work, by turns in one run, through the same front-end: the bare base with LoRA off and
in the merged engine's type (loadtests/rivals/bare_base.py), one adapter merged into an engine of its own, and one
through the LoRA path of the same server. Tokens a second of decoding and the time to the first token at each number of
clients, and the ratios merged / bare (what is meant to be 1) and merged / LoRA (the gain).

One process is a few per cent faster than the next of the same program, for as long as it lives. So all servers are
started several times, and the intervals are of what one start has in common against another; and the bare base runs
twice: twin / bare is what the measurement itself is worth.

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
from itertools import chain
from pathlib import Path
from statistics import geometric_mean, median

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
BARE, TWIN, OURS, SWAPPED = "bare", "twin", "merged", "LoRA"
"""The ways."""
RATIOS = ((OURS, BARE), (TWIN, BARE), (OURS, SWAPPED))
WAVES = 4
"""Requests of each client: the first of all clients come at once, those that follow as they come."""
LEAST = 8
"""Requests of a trace."""
WIDTH = 200
"""Of what is printed into a file."""
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
    parser.add_argument("--starts", type=int, default=4, help="of all servers (default: 4)")
    parser.add_argument("--repetitions", type=int, default=2, help="of each after a start (default: 2)")
    parser.add_argument("--quantization", choices=("none", "nf4"), default="none", help="of the base engine")
    parser.add_argument("--flag", action="append", default=[], help="for both servers, as --flag=--compile")
    add_base(parser)
    arguments = parser.parse_args(argv)
    base = chosen_base(arguments)
    found = []
    for number in range(arguments.starts):
        with tempfile.TemporaryDirectory() as directory, _servers(base, Path(directory), arguments) as ways:
            found.append(_measure(base, ways, number, arguments))
        _print(found)  # of all so far
    return 0


@contextmanager
def _servers(base: BaseModel, scratch: Path, arguments: argparse.Namespace) -> Iterator[list[Way]]:
    flags = ["--model", str(base.path), "--served-model-name", base.name, *arguments.flag]
    ours = [*flags, "--data-dir", str(scratch / "ours"), "--quantization", arguments.quantization]
    ours += ["--merge-probe-tokens", "128"]
    with (
        launch(ours, scratch / "ours.log") as server,
        _bare(flags, scratch / BARE) as bare,
        _bare(flags, scratch / TWIN) as twin,
    ):
        for each in (server, bare, twin):
            each.wait_ready(START_TIMEOUT_S)
        adapters = {
            name: write_adapter(scratch / name, base, rank=RANK, seed=seed) for seed, name in enumerate((MERGED, LORA))
        }
        upload(server.url, adapters)
        promote(server.url)
        yield [
            Way(BARE, bare.url, base.name),
            Way(OURS, server.url, MERGED),
            Way(TWIN, twin.url, base.name),
            Way(SWAPPED, server.url, LORA),
        ]


def _bare(flags: list[str], directory: Path) -> ServerProcess:
    port = free_port()
    command = [sys.executable, "-m", "loadtests.rivals.bare_base", "--port", str(port), *flags]
    command += ["--data-dir", str(directory), "--quantization", "none"]
    return start(command, f"http://127.0.0.1:{port}", directory.with_suffix(".log"))


def promote(url: str) -> None:
    """Have the adapter of that name merged, and wait for its engine."""
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
"""Clients → way → a figure for each repetition after one start."""


def _measure(base: BaseModel, ways: list[Way], start: int, arguments: argparse.Namespace) -> Measured:
    found: Measured = {clients: {way.name: [] for way in ways} for clients in arguments.clients}
    with LoadGenerator(base.path, quiet=True) as generator:
        for way in ways:
            generator.replay(make_trace(_waves(way.model, max(arguments.clients), arguments.tokens), 0), way.url)
        first = 1 + start * arguments.repetitions
        rounds = range(first, first + arguments.repetitions)
        said = f"measuring, start {start + 1} of {arguments.starts}"
        for number in track(rounds, said, console=Console(file=sys.stderr)):
            for clients in arguments.clients:
                for way in ways if number % 2 else reversed(ways):  # who comes first has no advantage
                    trace = make_trace(_waves(way.model, clients, arguments.tokens), number)
                    found[clients][way.name].append(Figures.of(generator.replay(trace, way.url), ANY))
    return found


def _waves(model: str, clients: int, tokens: int) -> Workload:
    requests = max(LEAST, WAVES * clients)
    return Workload((model,), requests, PROMPT, Lengths(tokens, tokens), concurrency=clients)


def _print(starts: Sequence[Measured]) -> None:
    table = Table(title=f"medians; ratios with their 95 % confidence intervals over starts ({len(starts)})")
    ways = (BARE, TWIN, OURS, SWAPPED)
    for heading in ("clients", "measure", *ways, *(f"{some} / {other}" for some, other in RATIOS)):
        table.add_column(heading, justify="left" if heading == "measure" else "right")
    for clients in starts[0]:
        for name, measure in MEASURES.items():
            values = {way: [[measure(each) for each in found[clients][way]] for found in starts] for way in ways}
            medians = [f"{median(chain(*values[way])):.1f}" for way in ways]
            ratios = [_shown(values[some], values[other]) for some, other in RATIOS]
            table.add_row(str(clients), name, *medians, *ratios)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)


def _shown(some: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> str:
    """Of the geometric means of each start."""
    means = [[geometric_mean(each) for each in starts] for starts in (some, others)]
    found = ratio(*means)
    if len(some) == 1:
        return f"{found.mean:.3f}"
    return f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})"


if __name__ == "__main__":
    sys.exit(main())
