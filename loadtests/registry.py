"""Does the registry stay as fast when it is full? `python -m loadtests.registry --versions 10000`

One server with the engine that answers at once, so that what is timed is the registry: the same requests with ten
versions registered and with thousands, as a ratio. Half of the versions are adapters of one version, half lie under one
name. The adapters are tiny: of one layer, rank 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median

import httpx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from adapters.base import BaseModel
from loadtests.base import add_base, chosen_base
from loadtests.figures import ratio
from loadtests.synthetic import write_adapter
from server.launch import launch

FEW = 10
BLOCKS = 8
"""Medians whose ratios are averaged."""
MANY_VERSIONS = "many-versions"
Step = Callable[[], object]


class Client:
    """Speaks to the server; every upload is an adapter that nobody had."""

    def __init__(self, url: str, base: BaseModel, scratch: Path) -> None:
        self._http = httpx.Client(base_url=url, timeout=120, trust_env=False)
        first = next(iter(base.modules))
        self._base = replace(base, modules={first: base.modules[first]})
        self._scratch = scratch
        self._made = 0

    def close(self) -> None:
        self._http.close()

    def upload(self, name: str) -> None:
        self._made += 1
        path = write_adapter(self._scratch / f"adapter-{self._made}", self._base, rank=1, seed=self._made)
        files = [("files", (each.name, each.read_bytes())) for each in sorted(path.iterdir())]
        tags = {"team": f"team-{self._made % 5}"} | ({"needle": "yes"} if self._made == 2 else {})
        form = {"name": name, "tags": json.dumps(tags)}
        self._http.post("/v1/adapters", data=form, files=files).raise_for_status()

    def get(self, path: str) -> None:
        self._http.get(path).raise_for_status()

    def chat(self, model: str) -> None:
        body = {"model": model, "messages": [{"role": "user", "content": "one two"}], "max_tokens": 1}
        self._http.post("/v1/chat/completions", json=body).raise_for_status()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.registry", description=__doc__)
    parser.add_argument("--versions", type=int, default=10_000, help="registered versions (default: 10000)")
    parser.add_argument("--repetitions", type=int, default=15, help="requests a median (default: 15)")
    add_base(parser)
    arguments = parser.parse_args(argv)
    base = chosen_base(arguments)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        flags = ["--engine", "fake", "--model", str(base.path), "--data-dir", str(scratch / "data")]
        with launch(flags, scratch / "server.log") as server:
            server.wait_ready(120)
            with closing(Client(server.url, base, scratch)) as client:
                few = _fill_and_measure(client, 0, FEW, arguments.repetitions)
                many = _fill_and_measure(client, FEW, arguments.versions, arguments.repetitions)
    _print(few, many, arguments.versions)
    return 0


def _fill_and_measure(client: Client, there: int, wanted: int, repetitions: int) -> dict[str, list[float]]:
    for number in track(
        range(there, wanted), f"registering up to {wanted:,} versions", console=Console(file=sys.stderr)
    ):
        client.upload(MANY_VERSIONS if number % 2 else f"adapter-{number:06}")
    steps = _steps(client)
    for step in steps.values():
        _median_s(step, repetitions)  # warms up
    return {what: [_median_s(step, repetitions) for _ in range(BLOCKS)] for what, step in steps.items()}


def _steps(client: Client) -> dict[str, Step]:
    fresh = iter(range(1_000_000_000))
    return {
        "list the first 5 adapters": lambda: client.get("/v1/adapters?limit=5&after=a"),
        "list 5 summaries by state": lambda: client.get("/v1/adapters?summary=true&limit=5&after=a&state=ready"),
        "list 5 summaries by a common tag": lambda: client.get("/v1/adapters?summary=true&limit=5&tag=team=team-1"),
        "list summaries by a tag of one version": lambda: client.get("/v1/adapters?summary=true&tag=needle=yes"),
        "list summaries by a state that none has": lambda: client.get("/v1/adapters?summary=true&state=failed"),
        "list 5 of many versions": lambda: client.get(f"/v1/adapters/{MANY_VERSIONS}/versions?limit=5"),
        "list 5 of many versions by tag": lambda: client.get(
            f"/v1/adapters/{MANY_VERSIONS}/versions?limit=5&tag=team=team-1"
        ),
        "show one version of a name with few": lambda: client.get("/v1/adapters/adapter-000000/versions/1"),
        "show one version of the name with many": lambda: client.get(f"/v1/adapters/{MANY_VERSIONS}/versions/1"),
        "chat with its latest version": lambda: client.chat(f"{MANY_VERSIONS}@latest"),
        "chat with an adapter": lambda: client.chat("adapter-000000"),
        "upload a new adapter": lambda: client.upload(f"fresh-{time.time_ns()}-{next(fresh)}"),
        "upload a new version": lambda: client.upload(MANY_VERSIONS),
    }


def _median_s(step: Step, repetitions: int) -> float:
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return median(times)


def _print(few: dict[str, list[float]], many: dict[str, list[float]], versions: int) -> None:
    table = Table(title="medians; ratios with their 95 % confidence intervals")
    for heading in ("", f"{FEW} versions", f"{versions:,} versions", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    for what, times in few.items():
        found = ratio(many[what], times)
        shown = f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})"
        table.add_row(what, f"{1e3 * median(times):.1f} ms", f"{1e3 * median(many[what]):.1f} ms", shown)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
