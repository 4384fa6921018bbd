"""Fine-tuning through the API on the real engine: trained beside it, tried by it, and chatted with. Real vLLM."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.flows.live import KEY, Live

pytestmark = pytest.mark.engine
PIRATE = Path(__file__).parents[2] / "adapters" / "train" / "demo" / "pirate.jsonl"
QUESTION: Any = [{"role": "user", "content": "How do I boil an egg?"}]


def ask(client: openai.OpenAI, model: str) -> str:
    answer = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=24, temperature=0)
    return answer.choices[0].message.content or ""


def test_what_is_fine_tuned_answers_otherwise_than_the_base(live: Live) -> None:
    supervised: Any = {"max_steps": 4, "batch_size": 4, "learning_rate": 2e-3, "max_length": 128}
    with openai.OpenAI(base_url=f"{live.server.url}/v1", api_key=KEY, max_retries=0) as client:
        rows = client.files.create(file=PIRATE, purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=live.base.name,
            training_file=rows.id,
            suffix="flow",
            method={"type": "supervised", "supervised": {"hyperparameters": supervised}},
        )
        deadline = time.monotonic() + 600
        while not job.finished_at:
            assert time.monotonic() < deadline, job
            ask(client, live.base.name)  # the engine answers meanwhile
            time.sleep(1)
            job = client.fine_tuning.jobs.retrieve(job.id)
        assert job.status == "succeeded", job.error
        assert job.fine_tuned_model is not None
        assert ask(client, job.fine_tuned_model) != ask(client, live.base.name)
