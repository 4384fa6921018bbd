"""What a request costs before an engine sees it: `python -m loadtests.front_end`, three minutes

A server whose engine answers at once (server/engine/fake.py) is asked for the base, for an adapter and for a merged
engine, by turns. Clients ask together and wait for each other: what one request does while others wait adds up. They
are bare sockets of this process, as the load generator takes more of a core than what is measured here.

It says nothing of vLLM's own share, parsing and rendering, which every way has alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from loadtests.base import add_base, chosen_base
from loadtests.merged import LORA, MERGED, RANK, WIDTH, promote
from loadtests.servers import upload
from loadtests.synthetic import write_adapter
from server.launch import launch

END = b"0\r\n\r\n"
"""Of a chunked answer."""
WARMING = 10
"""Waves that are not counted."""
BODY = {"prompt": "one two three", "max_tokens": 4, "stream": True}


@dataclass
class Waited:
    """Of one way, asked by so many at once."""

    first_s: list[float] = field(default_factory=list)
    """From each request to its first event."""
    wave_s: list[float] = field(default_factory=list)
    """From the first request of a wave to the end of its last answer."""


Found = Mapping[int, Mapping[str, Waited]]
"""Clients → model → what was found."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.front_end", description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 16], help="at once (default: 1 8 16)")
    parser.add_argument("--waves", type=int, default=200, help="of each number of clients and each way (default: 200)")
    add_base(parser)
    arguments = parser.parse_args(argv)
    base = chosen_base(arguments)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        flags = ["--engine", "fake", "--model", str(base.path), "--served-model-name", base.name]
        flags += ["--data-dir", str(scratch / "data"), "--quantization", "none", "--merge-probe-tokens", "16"]
        with launch(flags, scratch / "server.log") as server:
            server.wait_ready()
            named = enumerate((MERGED, LORA))
            upload(
                server.url, {name: write_adapter(scratch / name, base, rank=RANK, seed=seed) for seed, name in named}
            )
            promote(server.url)
            models = (base.name, LORA, MERGED)
            _print({each: asyncio.run(ask(server.url, models, each, arguments.waves)) for each in arguments.clients})
    return 0


async def ask(url: str, models: Sequence[str], clients: int, waves: int) -> dict[str, Waited]:
    """Wave after wave; who comes first in one comes last in the next."""
    address = urlsplit(url)
    sockets = [await asyncio.open_connection(address.hostname, address.port) for _ in range(clients)]
    found = {model: Waited() for model in models}
    try:
        for number in range(WARMING + waves):
            for model in models if number % 2 else reversed(models):
                began = time.perf_counter()
                first_s = await asyncio.gather(*(_first(*socket, model) for socket in sockets))
                if number >= WARMING:
                    found[model].first_s += first_s
                    found[model].wave_s.append(time.perf_counter() - began)
    finally:
        for _, writer in sockets:
            writer.close()
            await writer.wait_closed()
    return found


async def _first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, model: str) -> float:
    """Seconds until its first event; returns when all of them are there."""
    body = json.dumps({**BODY, "model": model}).encode()
    head = "POST /v1/completions HTTP/1.1", "host: 127.0.0.1", "content-type: application/json"
    began = time.perf_counter()
    writer.write("\r\n".join([*head, f"content-length: {len(body)}", "", ""]).encode() + body)
    heard, first_s = b"", None
    while not heard.endswith(END):
        came = await reader.read(1 << 16)
        heard += came
        if not came or not heard.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"{model}: {heard.decode()!r:.500}")
        if first_s is None and b"data: " in heard:
            first_s = time.perf_counter() - began
    assert first_s is not None
    return first_s


def _print(found: Found) -> None:
    table = Table(title="an engine that answers at once: medians, and how much more than the base")
    for heading in ("clients", "asked for", "first event ms", "more than the base", "requests/s"):
        table.add_column(heading, justify="left" if heading == "asked for" else "right")
    for clients, ways in found.items():
        base_s, *_ = (median(waited.first_s) for waited in ways.values())
        for model, waited in ways.items():
            first_s, rate = median(waited.first_s), clients / median(waited.wave_s)
            table.add_row(
                str(clients), model, f"{1e3 * first_s:.2f}", f"{1e3 * (first_s - base_s):+.2f}", f"{rate:.0f}"
            )
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)


if __name__ == "__main__":
    sys.exit(main())
