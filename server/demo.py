"""The product doing its job, for a stranger: train two adapters, upload them, chat with base and both in one batch.

Everything goes through the front door: the training command, the HTTP API, a server started as anyone would.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from adapters.base import BaseModel
from adapters.demo_base import NAME as DEMO_NAME
from adapters.demo_base import prepare_demo_base
from server.launch import ServerProcess, free_port, launch

ADAPTERS = ("pirate", "ticket")
QUESTIONS = ("What is the capital of France?", "How do I reset my password?", "Why is the sky blue?")
console = Console()


@dataclass(frozen=True)
class Reply:
    model: str
    question: str
    text: str
    path: str
    ttft_s: float


@dataclass
class Account:
    """What happened, for the closing table."""

    base_mb: tuple[float, float] = (0.0, 0.0)
    ready_s: float = 0.0
    training_s: dict[str, float] | None = None
    batch_peak: int = 0


def main(argv: list[str]) -> int:
    """Exit code 0 when all three models answered, and answered differently; 130 when it was stopped."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # however it is stopped, no server stays behind
    try:
        return _run(_arguments(argv))
    except KeyboardInterrupt:
        console.print("stopped")
        return 130


def _run(arguments: argparse.Namespace) -> int:
    account = Account(training_s={})
    base = _base(arguments, account)
    with _server(arguments, base) as server:
        _train_and_upload(arguments, base, server, account)
        account.ready_s = server.wait_ready()
        replies = asyncio.run(_chat(server.url, base.name, account))
        _tell(account, replies, server.url, server.log)
        if arguments.serve:
            _stay_up(server)
    return 0 if _all_differ(replies) else 1


def _base(arguments: argparse.Namespace, account: Account) -> BaseModel:
    console.rule("[bold]1 · the base model")
    path = prepare_demo_base(arguments.cache_dir / "demo-base" / DEMO_NAME)
    base = BaseModel.read(path, cache_dir=arguments.cache_dir / "fingerprints")
    account.base_mb = _megabytes(base)
    console.print(
        f"{base.name}: {account.base_mb[0]:.0f} MB in bf16, {account.base_mb[1]:.0f} MB as served "
        "(linear layers in NF4, embedding in bf16)"
    )
    return base


def _megabytes(base: BaseModel) -> tuple[float, float]:
    """Weights in bf16, and with the linear layers in NF4: 4 bits a weight and 32 bits for each block of 64."""
    linear = sum(rows * columns for rows, columns in base.modules.values())
    on_disk = sum(file.stat().st_size for file in base.path.glob("*.safetensors")) / 1e6
    return on_disk, on_disk - linear * (2 - (0.5 + 4 / 64)) / 1e6


def _server(arguments: argparse.Namespace, base: BaseModel) -> ServerProcess:
    """Started now, so that the engine is built while the adapters are trained."""
    port = arguments.port or free_port()
    flags = ["--model", str(base.path), "--served-model-name", base.name, "--data-dir", str(arguments.data_dir)]
    return launch(flags, arguments.data_dir / "demo-server.log", port=port)


def _train_and_upload(arguments: argparse.Namespace, base: BaseModel, server: ServerProcess, account: Account) -> None:
    wait_until_listening(server)
    for number, name in enumerate(ADAPTERS, 2):
        console.rule(f"[bold]{number} · adapter {name}: train, upload")
        started = time.perf_counter()
        config = files("adapters.train") / "demo" / f"{name}.yaml"
        command = [sys.executable, "-m", "adapters.train", "run", str(config), "--server", server.url]
        command += ["--set", f"model.model_name_or_path={base.path}"]
        command += ["--set", f"output.output_dir={arguments.cache_dir / 'demo-adapters' / name}"]
        subprocess.run(command, check=True)
        assert account.training_s is not None
        account.training_s[name] = time.perf_counter() - started


def wait_until_listening(server: ServerProcess) -> None:
    alive = ServerProcess(server.process, server.url, server.log, ready_path="/livez")
    alive.wait_ready(120)


async def _chat(url: str, base_name: str, account: Account) -> list[Reply]:
    console.rule("[bold]4 · base, pirate and ticket in one batch")
    models = (base_name, *ADAPTERS)
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:
        watcher = asyncio.create_task(_watch_batch(client, account))
        replies = await asyncio.gather(*[_ask(client, model, question) for question in QUESTIONS for model in models])
        watcher.cancel()
    return list(replies)


async def _ask(client: httpx.AsyncClient, model: str, question: str) -> Reply:
    message = {"role": "user", "content": question}
    body = {"model": model, "messages": [message], "max_tokens": 48, "temperature": 0, "stream": True}
    started, first, parts = time.perf_counter(), 0.0, []
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        path = response.headers["x-loraplex-path"]
        async for line in response.aiter_lines():
            if (text := _delta(line)) is not None:
                first = first or time.perf_counter() - started
                parts.append(text)
    return Reply(model, question, "".join(parts), path, first)


def _delta(line: str) -> str | None:
    if not line.startswith("data: {"):
        return None
    event: dict[str, Any] = httpx.Response(200, content=line.removeprefix("data: ")).json()
    if "error" in event:
        raise RuntimeError(event["error"]["message"])
    return event["choices"][0]["delta"].get("content") or None


async def _watch_batch(client: httpx.AsyncClient, account: Account) -> None:
    """The largest number of requests that the engine itself says it ran at once."""
    while True:
        page = (await client.get("/metrics")).text
        for family in text_string_to_metric_families(page):
            if family.name == "vllm:num_requests_running":
                account.batch_peak = max(account.batch_peak, int(family.samples[0].value))
        await asyncio.sleep(0.05)


def _tell(account: Account, replies: list[Reply], url: str, log: Path) -> None:
    table = Table(show_lines=True, expand=True)
    for heading, ratio in (("question", 2), ("base", 4), *((name, 4) for name in ADAPTERS)):
        table.add_column(heading, ratio=ratio)
    for question in QUESTIONS:
        table.add_row(question, *(reply.text.strip() for reply in replies if reply.question == question))
    console.print(table)
    worst = max(reply.ttft_s for reply in replies)
    console.print(
        f"{len(replies)} requests at once, up to {account.batch_peak} in one engine batch; slowest first token "
        f"{worst:.2f} s (both adapters were loaded into the engine for it)"
    )
    for name, seconds in (account.training_s or {}).items():
        console.print(f"adapter {name}: trained, evaluated and uploaded in {seconds:.0f} s")
    console.print(f"API at {url}/v1; registry, adapters and the server's log are in {log.parent}")


def _all_differ(replies: list[Reply]) -> bool:
    by_question = {question: {r.text for r in replies if r.question == question} for question in QUESTIONS}
    return all(len(texts) == 1 + len(ADAPTERS) and all(texts) for texts in by_question.values())


def _stay_up(server: ServerProcess) -> None:
    console.rule("[bold]serving")
    console.print(f"curl {server.url}/v1/models      (Ctrl-C ends it)")
    try:
        server.process.wait()
    except KeyboardInterrupt:
        console.print("stopping")


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="loraplex demo", description="Train two adapters, serve them, chat.")
    parser.add_argument("--serve", action="store_true", help="leave the server up (port 8000) until Ctrl-C")
    parser.add_argument("--port", type=int, help="port of the server (default: 8000 with --serve, else a free one)")
    parser.add_argument("--data-dir", type=Path, default=Path(".loraplex"), help="registry and adapters")
    parser.add_argument("--cache-dir", type=Path, default=Path(".cache"), help="demo base and trained adapters")
    arguments = parser.parse_args(argv)
    if arguments.serve and arguments.port is None:
        arguments.port = 8000
    return arguments
