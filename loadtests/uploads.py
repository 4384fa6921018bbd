"""Do uploads disturb traffic? `python -m loadtests.uploads`

One server with the real engine answers a steady few streams, block by block: nobody uploads; plain LoRAs are uploaded
one after the other, each tried by the engine; DoRAs are uploaded that have to be converted, by singular values. What
the streams receive is compared with the quiet blocks of the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.numpy import load_file, save_file

from adapters.base import BaseModel
from loadtests.base import add_base, chosen_base
from loadtests.figures import ratio
from loadtests.synthetic import write_adapter
from server.launch import launch

QUIET, PLAIN, CONVERTED = "nobody uploads", "plain LoRAs", "DoRAs, converted"
STREAMS = 4
TOKENS = 48
ATTENTION = ("q_proj", "v_proj")


@dataclass
class Block:
    """What the streams received while it lasted."""

    tokens_per_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    uploads: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.uploads", description=__doc__)
    parser.add_argument("--seconds", type=float, default=12, help="a block (default: 12)")
    parser.add_argument("--repetitions", type=int, default=4, help="blocks of each kind (default: 4)")
    add_base(parser)
    arguments = parser.parse_args(argv)
    base = chosen_base(arguments)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        flags = ["--model", str(base.path), "--served-model-name", base.name, "--data-dir", str(scratch / "data")]
        with launch(flags, scratch / "server.log") as server:
            server.wait_ready(900)
            blocks = asyncio.run(_measure(server.url, base, scratch, arguments.seconds, arguments.repetitions))
    _print(blocks)
    return 0


async def _measure(
    url: str, base: BaseModel, scratch: Path, seconds: float, repetitions: int
) -> dict[str, list[Block]]:
    fresh = itertools.count()
    models = [base.name]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False, limits=limits) as client:
        for number in range(STREAMS - 1):
            path = write_adapter(scratch / f"served-{number}", base, rank=8, seed=number, strength=0.12)
            await _upload(client, f"served-{number}", path)
            models.append(f"served-{number}")
        makers = {QUIET: None, PLAIN: _plain(base, scratch, fresh), CONVERTED: _doras(base, scratch, fresh)}
        for maker in makers.values():  # warms up
            await _block(client, models, maker, seconds / 3)
        blocks: dict[str, list[Block]] = {kind: [] for kind in makers}
        progress = track(range(repetitions), "blocks", console=Console(file=sys.stderr))
        for _ in progress:
            for kind, maker in makers.items():
                blocks[kind].append(await _block(client, models, maker, seconds))
    return blocks


async def _block(client: httpx.AsyncClient, models: list[str], maker: Iterator[Path] | None, seconds: float) -> Block:
    block, end = Block(), time.perf_counter() + seconds
    uploading = asyncio.create_task(_keep_uploading(client, maker, end, block)) if maker else None
    started = time.perf_counter()
    counts = await asyncio.gather(*[_keep_asking(client, model, end, block) for model in models])
    block.tokens_per_s = sum(counts) / (time.perf_counter() - started)
    if uploading is not None:
        await uploading
    return block


async def _keep_asking(client: httpx.AsyncClient, model: str, end: float, block: Block) -> int:
    received = 0
    body = {"model": model, "messages": [{"role": "user", "content": "Tell me a long story."}], "ignore_eos": True}
    body |= {"max_tokens": TOKENS, "temperature": 0, "stream": True}
    while time.perf_counter() < end:
        last, first = time.perf_counter(), True
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    now = time.perf_counter()
                    (block.ttft_s if first else block.gaps_s).append(now - last)
                    last, first, received = now, False, received + 1
    return received


async def _keep_uploading(client: httpx.AsyncClient, maker: Iterator[Path], end: float, block: Block) -> None:
    while time.perf_counter() < end:
        path = await asyncio.to_thread(next, maker)
        await _upload(client, "uploaded", path)
        block.uploads += 1


async def _upload(client: httpx.AsyncClient, name: str, path: Path) -> None:
    form = {"name": name, "max_error": "1"}
    files = await asyncio.to_thread(_parts, path)
    (await client.post("/v1/adapters", data=form, files=files)).raise_for_status()


def _parts(path: Path) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", (each.name, each.read_bytes())) for each in sorted(path.iterdir())]


def _plain(base: BaseModel, scratch: Path, fresh: Iterator[int]) -> Iterator[Path]:
    for number in fresh:
        yield write_adapter(scratch / f"plain-{number}", base, rank=8, seed=number, targets=ATTENTION)


def _doras(base: BaseModel, scratch: Path, fresh: Iterator[int]) -> Iterator[Path]:
    for number in fresh:
        path = write_adapter(scratch / f"dora-{number}", base, rank=8, seed=number, targets=ATTENTION)
        weights, config = path / "adapter_model.safetensors", path / "adapter_config.json"
        tensors = load_file(weights)
        for name in [name for name in tensors if name.endswith("lora_B.weight")]:
            rows = tensors[name].shape[0]
            magnitude = name.replace("lora_B.weight", "lora_magnitude_vector")
            tensors[magnitude] = np.asarray(np.random.default_rng(number).uniform(0.9, 1.1, rows), np.float32)
        save_file(tensors, weights, metadata={"format": "pt"})
        config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
        yield path


def _print(blocks: dict[str, list[Block]]) -> None:
    table = Table(title="what the streams receive; ratios to the quiet blocks with their 95 % confidence intervals")
    for heading in ("", "uploads", "tokens/s", "ratio", "token gap p99", "ratio", "TTFT p99", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    quiet = blocks[QUIET]
    for kind, found in blocks.items():
        rows = [str(sum(block.uploads for block in found))]
        for unit, values, reference in (
            ("", [block.tokens_per_s for block in found], [block.tokens_per_s for block in quiet]),
            (" ms", [_p99_ms(block.gaps_s) for block in found], [_p99_ms(block.gaps_s) for block in quiet]),
            (" ms", [_p99_ms(block.ttft_s) for block in found], [_p99_ms(block.ttft_s) for block in quiet]),
        ):
            compared = ratio(values, reference)
            rows += [f"{np.mean(values):.0f}{unit}", f"{compared.mean:.2f} ({compared.low:.2f} to {compared.high:.2f})"]
        table.add_row(kind, *rows)
    Console().print(table)


def _p99_ms(seconds: list[float]) -> float:
    return 1e3 * float(np.percentile(seconds, 99))


if __name__ == "__main__":
    sys.exit(main())
