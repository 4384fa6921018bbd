"""The demo's pirate, merged and written as GGUF, answers in llama.cpp as PEFT does with it beside its base in NF4."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from adapters.base import BaseModel
from adapters.merge.apply import write_merged
from adapters.merge.export import llama_cpp
from adapters.merge.export.gguf_file import OutType
from adapters.merge.export.gguf_model import plan_gguf, write_model
from adapters.merge.export.origin import origin_of
from adapters.merge.export.parity import Parity, compare
from adapters.merge.plan import plan_merge
from tests.flows.spoken import MOST, Spoken, spoken

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: uv pip install xllamacpp")
pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True)
class Merged:
    directory: BaseModel
    spoken: Spoken


@pytest.fixture(scope="module")
def merged(demo_base: Path, demo_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Merged:
    plan = plan_merge(demo_adapters["pirate"], BaseModel.read(demo_base), "dequantized", "float32")
    path = tmp_path_factory.mktemp("merged") / "pirate"
    write_merged(plan, path)
    return Merged(BaseModel.read(path), spoken(demo_base, demo_adapters["pirate"], plan))


def heard(merged: Merged, path: Path, outtype: OutType) -> tuple[list[list[int]], Parity]:
    """Greedy answers of llama.cpp, and how near it is on those of PEFT."""
    plan = plan_gguf(merged.directory, outtype, origin_of(merged.directory.path))
    write_model(plan, path)
    said = merged.spoken
    with llama_cpp.loaded(path, plan.decoder.vocabulary, context=512) as reader:
        answers = [reader.greedy(prompt, MOST) for prompt in said.prompts]
        rows = [reader.rows(*chat) for chat in said.chats]
    return answers, compare(said.rows, np.concatenate(rows), said.came)


def test_f16_gives_the_same_text(merged: Merged, tmp_path: Path) -> None:
    answers, parity = heard(merged, tmp_path / "pirate.gguf", "f16")
    print(parity)
    assert answers == merged.spoken.answers
    assert all(len(answer) > 5 for answer in answers)
    assert parity.kl < 1e-3
    assert parity.same_first == 1.0


def test_q8_0_is_as_near_as_eight_bits_are(merged: Merged, tmp_path: Path) -> None:
    """Two tokens that are as likely as each other may change places, and then the text goes on otherwise."""
    answers, parity = heard(merged, tmp_path / "pirate.gguf", "q8_0")
    print(parity)
    assert [answer[:10] for answer in answers] == [answer[:10] for answer in merged.spoken.answers]
    assert parity.kl < 0.01
    assert parity.same_first > 0.95
