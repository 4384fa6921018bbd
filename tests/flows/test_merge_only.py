"""What vLLM cannot hot-swap, served by an engine of its own: PEFT's own log-probabilities. Real vLLM, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.flows.live import Live
from tests.flows.token_gaps import gaps, served
from tests.flows.zoo import MERGE_ONLY, QUERY_VALUE, lora, make

pytestmark = pytest.mark.engine
MERGED = "/v1/adapters/own/versions/1/merged"
TOLERANCE = 3e-4
"""Nats, of any token, as in test_zoo.py."""
CASE = lora(MERGE_ONLY, target_modules=[*QUERY_VALUE, "embed_tokens"], modules_to_save=["model.norm"])
"""A trained norm, and an embedding that parts from the head, with which the base shares it."""


def test_it_is_refused_then_served_merged_then_refused_again(beside: Live, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    pristine: Any = AutoModelForCausalLM.from_pretrained(beside.base.path, dtype=torch.float32)
    reference = make(CASE, pristine, tmp_path / "own")
    shown = beside.upload("own", tmp_path / "own").json()
    assert (shown["state"], shown["aliases"]) == ("merge_only", [])
    chat = {"model": "own@1", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    with beside.client() as client:
        refused = client.post("/v1/chat/completions", json=chat)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "adapter_merge_only"), refused.text
        job = client.put(f"{MERGED}?wait_s=600", timeout=660).json()
        assert job["state"] == "succeeded", (job, beside.server.tail())
        moved = client.put("/v1/adapters/own/aliases/live", json={"version": 1})
        assert moved.status_code == 200, moved.text
        answers = served(beside, "own@live")
        off, idle = gaps(reference, answers), gaps(pristine, answers)
        print(f"{len(off)} tokens, |dlogp| {max(off):.2g} at most; of the base {max(idle):.2g}")
        assert max(idle) > 0.5
        assert max(off) < TOLERANCE
        assert client.delete(f"{MERGED}?force=true").json()["ended"]
        assert client.post("/v1/chat/completions", json=chat | {"model": "own@live"}).status_code == 503
        assert client.delete("/v1/adapters/own").json()["deleted"]
