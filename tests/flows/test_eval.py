"""`train eval` through a server against `train eval` without one: the same adapter, data, answers and scores.

In fp32, where rounding flips no answer. In bf16 it may flip one where two tokens are as good as each other
(loadtests/RESULTS.md).
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from adapters.train.cli import main
from tests.flows.live import KEY, Live
from tests.flows.trained import trained, write_rows

pytestmark = pytest.mark.engine
ITEMS = ("lamp", "kettle", "printer", "router", "chair", "clock", "radio", "fan")
PROBLEMS = {
    True: ("does not turn on", "is in pieces", "makes a strange noise", "fell and broke"),
    False: ("has not arrived", "is two weeks late", "went to a neighbour", "is still on its way"),
}
ASKED = 10


def rows() -> list[dict[str, Any]]:
    found = [
        {
            "messages": [
                {"role": "system", "content": "One line of JSON."},
                {"role": "user", "content": f"My {item} {problem}."},
                {"role": "assistant", "content": json.dumps({"item": item, "broken": broken})},
            ]
        }
        for item in ITEMS
        for broken, problems in PROBLEMS.items()
        for problem in problems
    ]
    random.Random(0).shuffle(found)
    return found


def evaluated(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """What it prints, without frames: a line a score, of base and adapter; then every wrong answer of the adapter."""
    assert main(["eval", *words, "--max-new-tokens", "20", "--show", str(ASKED)]) == 0
    lines = [" ".join(line.strip("│").replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    return [line for line in lines if any(map(str.isalnum, line))]


def test_the_offline_and_the_served_path_print_the_same(
    exact: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six steps teach the form and the item, and not yet what broken means: some answers are right, some are not."""
    asked, learnt = rows()[:ASKED], rows()[ASKED:]
    base = exact.base.path
    adapter = trained(base, tmp_path, learnt, {"r": 8}, {"max_steps": 6, "learning_rate": 3e-3})
    data = str(write_rows(asked, tmp_path / "asked.jsonl"))
    assert exact.upload("judged", adapter).status_code == 201
    served = evaluated(capsys, "judged", "--server", exact.server.url, "--api-key", KEY, "--data", data)
    offline = evaluated(capsys, str(adapter), "--base", str(base), "--data", data)
    print(*served, sep="\n")
    served.remove(f"answered by base {ASKED} lora {ASKED}")
    assert served == [line for line in offline if not line.startswith("loss")]
    assert len(served) < len(offline)
    (exact_match,) = (line for line in served if line.startswith("exact match"))
    before, after = exact_match.split()[2:]
    assert before == "0.0%"
    assert after not in ("0.0%", "100.0%")
