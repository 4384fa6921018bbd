"""README's script for OpenAI's fine-tuning API, word for word, on the real engine: upload, train beside it, chat."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.contracts.test_docs import blocks, section
from tests.flows.live import KEY, Live

pytestmark = pytest.mark.engine
PIRATE = Path(__file__).parents[2] / "adapters" / "train" / "demo" / "pirate.jsonl"
ROWS = 8
"""Enough for it to answer otherwise, and few enough for a dozen steps."""
QUESTION: Any = [{"role": "user", "content": "Who are you?"}]


def script(live: Live) -> str:
    """The address and the key are those of this server."""
    (program,) = blocks(section("### Fine-tuning"), "python")
    assert QUESTION[0]["content"] in program
    for shown, here in {"http://127.0.0.1:8000": live.server.url, 'api_key="none"': f'api_key="{KEY}"'}.items():
        assert shown in program
        program = program.replace(shown, here)
    return program


def ask(client: openai.OpenAI, model: str) -> str:
    answer = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=24, temperature=0)
    return answer.choices[0].message.content or ""


def test_the_script_of_the_readme_trains_and_gets_another_answer_than_the_base(live: Live, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(PIRATE.read_text().splitlines(keepends=True)[:ROWS]))
    (tmp_path / "script.py").write_text(script(live))
    with openai.OpenAI(base_url=f"{live.server.url}/v1", api_key=KEY, max_retries=0) as client:
        command = [sys.executable, "script.py"]
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as running:
            while running.poll() is None:
                before = ask(client, live.base.name)  # the engine answers meanwhile
            assert running.stdout is not None
            printed = running.stdout.read()
        assert running.returncode == 0, printed
        (job,) = client.fine_tuning.jobs.list(limit=1).data
        assert job.status == "succeeded"
        assert (job.fine_tuned_model or "").startswith("ft-crew-")
        assert ask(client, str(job.fine_tuned_model)) != before
    assert "step,train_loss" in printed
