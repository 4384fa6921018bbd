"""A real training run through the unmodified OpenAI client, on a base of random weights and the fake engine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import openai

from server.launch import ServerProcess, launch
from tests.server.harness import PATIENCE_S

ROWS: list[Any] = [
    {"messages": [{"role": "user", "content": f"Who is number {n}?"}, {"role": "assistant", "content": f"Sailor {n}."}]}
    for n in range(12)
]
WRONG: list[Any] = [*ROWS[:2], {"messages": [{"role": "user", "content": "?"}, {"role": "robot", "content": "!"}]}]


def started(base: Path, root: Path) -> ServerProcess:
    return launch(["--engine", "fake", "--model", str(base), "--data-dir", str(root / "data")], root / "server.log")


def connected(server: ServerProcess) -> openai.OpenAI:
    server.wait_ready(PATIENCE_S)
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def sent(client: openai.OpenAI, rows: list[Any], name: str) -> str:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return client.files.create(file=(name, content), purpose="fine-tune").id


def until(client: openai.OpenAI, job_id: str, *words: str) -> Any:
    """The job when one of its events begins with one of these words, or when it has ended."""
    deadline = time.monotonic() + 300
    while True:
        events = list(client.fine_tuning.jobs.list_events(job_id))
        job = client.fine_tuning.jobs.retrieve(job_id)  # after them: it is at least as far as they say
        if job.finished_at or any(event.message.startswith(words) for event in events if words):
            return job
        assert time.monotonic() < deadline, [event.message for event in events]
        time.sleep(0.1)


def test_upload_fine_tune_a_kill_in_the_middle_and_chat(small_base: Path, tmp_path: Path) -> None:
    supervised: Any = {"hyperparameters": {"n_epochs": 12, "batch_size": 2, "learning_rate_multiplier": 20, "r": 4}}
    with started(small_base, tmp_path) as server, connected(server) as client:
        wrong = client.fine_tuning.jobs.create(model="small", training_file=sent(client, WRONG, "wrong.jsonl"))
        job = client.fine_tuning.jobs.create(
            model=small_base.name,
            training_file=sent(client, ROWS[:9], "rows.jsonl"),
            validation_file=sent(client, ROWS[9:], "rows.jsonl"),
            suffix="crew",
            seed=3,
            method={"type": "supervised", "supervised": supervised},
        )
        failed = until(client, wrong.id)
        assert (failed.status, failed.error.code, failed.error.param) == ("failed", "bad_data", "training_file")
        assert "training_file/wrong.jsonl:3:messages[1].role" in failed.error.message
        assert until(client, job.id, "Step 2/").status == "running"
        server.kill()
    with started(small_base, tmp_path) as server, connected(server) as client:
        job = until(client, job.id)
        assert job.status == "succeeded", job.error
        assert job.fine_tuned_model == f"ft-crew-{job.id[-8:]}"
        assert job.trained_tokens
        messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
        assert "Training begun on 9 rows, 3 held out" in messages
        assert "its worker was not heard of any more; queued again" in messages
        table = client.files.content(job.result_files[0]).text.splitlines()
        assert [line.split(",")[0] for line in table] == ["step", *map(str, range(1, len(table)))]
        question: Any = [{"role": "user", "content": "Who is number 3?"}]
        answer = client.chat.completions.create(model=job.fine_tuned_model, messages=question)
        assert (answer.choices[0].message.content or "").startswith(f"[{job.fine_tuned_model}@")
        (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
        assert checkpoint.fine_tuned_model_checkpoint == f"{job.fine_tuned_model}@1"
