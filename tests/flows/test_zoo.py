"""Every kind that PEFT makes, uploaded to a server: its verdict, and where it serves, PEFT's own log-probabilities.

In fp32 on both sides, on the values of the NF4 base, so that rounding hides nothing. Where a conversion has an error,
what is served must still be nearer to PEFT's adapter than the base is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.flows.live import Live
from tests.flows.token_gaps import gaps, served
from tests.flows.zoo import EXACTLY, MERGE_ONLY, WITH_ERROR, ZOO, Case, make

pytestmark = pytest.mark.engine
TOLERANCE = 3e-4
"""Nats, of any token. Measured: 5.5e-5 at most."""


@pytest.fixture(scope="module")
def pristine(exact: Live) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(exact.base.path, dtype=torch.float32)


def upload(live: Live, directory: Path, case: Case) -> Any:
    files = [("files", (file.name, file.read_bytes())) for file in sorted(directory.iterdir())]
    with live.client() as client:
        return client.post("/v1/adapters", data={"name": "zoo", **case.fields}, files=files)


@pytest.mark.parametrize("name", ZOO)
def test_its_verdict_and_what_it_answers(exact: Live, pristine: Any, tmp_path: Path, name: str) -> None:
    case = ZOO[name]
    directory = tmp_path / "saved"
    reference = make(case, pristine, directory)
    response = upload(exact, directory, case)
    shown = response.json()
    if case.verdict is None:
        assert (response.status_code, shown["error"]["code"]) == (422, case.code)
        assert len(shown["error"]["message"]) > 40
        return
    try:
        assert response.status_code == 201, response.text
        assert shown["verdict"].startswith(case.verdict), shown["verdict"]
        if case.verdict == MERGE_ONLY:
            assert (shown["state"], shown["aliases"]) == ("merge_only", [])
            return
        answers = served(exact, "zoo")
        off, idle = gaps(reference, answers), gaps(pristine, answers)
        print(f"{name}: {shown['verdict']}; {len(off)} tokens, |dlogp| {max(off):.2g} at most; base {max(idle):.2g}")
        assert max(idle) > 0.02
        if case.verdict == WITH_ERROR:
            assert sum(off) < 0.7 * sum(idle)
            assert "original_adapter_model.safetensors" in shown["manifest"]["files"]
        else:
            assert max(off) < TOLERANCE
            assert shown["manifest"]["conversion"].get("exact", True)
            assert (case.verdict == EXACTLY) == bool(shown["manifest"]["conversion"])
        assert shown["probe"]["largest_change"] > 0.02
    finally:
        with exact.client() as client:
            assert client.delete("/v1/adapters/zoo").json()["deleted"]


def test_the_zoo_is_large_and_has_every_verdict() -> None:
    verdicts = [case.verdict for case in ZOO.values()]
    assert len(verdicts) > 25
    assert set(verdicts) == {"served as it came", EXACTLY, WITH_ERROR, MERGE_ONLY, None}
