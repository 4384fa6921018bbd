"""`eval` against computations of its own: merged weights asked one by one, the loss that the run recorded, a server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from adapters.merge.cli import main as merge
from adapters.train.cli import main
from adapters.train.config import load_config
from adapters.train.data import split_by_hash
from adapters.train.reading import read_files
from adapters.train.trial import computed_in
from tests.adapters.train.conftest import ROWS

QUESTIONS = ("Hello", "Who are you?", "Where do ships go when it storms?")
TOKENS = 6


@pytest.fixture(scope="module")
def loud_base(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small base with embeddings twenty times as long: as it is, its logits are too flat to prefer any token."""
    import torch
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("loud") / "loud"
    shutil.copytree(small_base, path)
    model = AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def learnt(loud_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that changed what the base says; the adapter is in `out`."""
    root = tmp_path_factory.mktemp("learnt")
    (root / "rows.jsonl").write_text(ROWS)
    values: dict[str, Any] = {
        "model": {"model_name_or_path": str(loud_base), "dtype": "float32"},
        "quantization": {"load_in_4bit": False},
        "data": {"train": ["rows.jsonl"], "eval_split": 0.25},
        "training": {"max_steps": 6, "per_device_train_batch_size": 3, "learning_rate": 2e-2},
        "output": {"output_dir": str(root / "out"), "name": "learnt"},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["run", str(root / "run.yaml")]) == 0
    return root


@pytest.fixture(scope="module")
def asked(learnt: Path, loud_base: Path, tokenizer: Any) -> Path:
    """A data file whose answers are those of the merged weights, each generated alone and without padding."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(loud_base, dtype="float32")
    model = PeftModel.from_pretrained(base, str(learnt / "out")).merge_and_unload()
    rows = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
        answer = tokenizer.decode(out[0][ids.shape[1] :], skip_special_tokens=True).strip()
        rows.append({"messages": [*messages, {"role": "assistant", "content": answer}]})
    path = learnt / "asked.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def scores(capsys: pytest.CaptureFixture[str], *command: str) -> dict[str, Any]:
    assert main(["eval", *command, "--max-new-tokens", str(TOKENS), "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_the_adapter_answers_as_its_merged_weights_and_the_base_does_not(
    learnt: Path, loud_base: Path, asked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = scores(capsys, str(learnt / "out"), "--base", str(loud_base), "--data", str(asked))
    assert (found["base"]["exact"], found["adapter"]["exact"]) == (0.0, 1.0)
    assert found["adapter"]["rows"] == len(QUESTIONS)


def test_the_losses_are_those_that_the_run_recorded(
    learnt: Path, loud_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(learnt / "run.yaml")
    held_out = split_by_hash(read_files(config.data.train).conversations, config.data.eval_split).held_out
    path = learnt / "held_out.jsonl"
    path.write_text("\n".join(json.dumps({"messages": row.messages}) for row in held_out))
    found = scores(capsys, str(learnt / "out"), "--base", str(loud_base), "--data", str(path))
    recorded = json.loads((learnt / "out" / "loraplex.json").read_text())["scores"]
    assert found["base"]["loss"] == pytest.approx(recorded["held_out_loss_base"], abs=1e-4)
    assert found["adapter"]["loss"] == pytest.approx(recorded["held_out_loss"], abs=1e-4)


def test_a_merged_model_scores_as_the_adapter_that_went_into_it(
    learnt: Path, loud_base: Path, asked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = learnt / "merged"
    flags = ["--from", "original", "--dtype", "float32", "--no-verify"]
    assert merge([str(learnt / "out"), "--base", str(loud_base), "--out", str(merged), *flags]) == 0
    capsys.readouterr()
    apart = scores(capsys, str(learnt / "out"), "--base", str(loud_base), "--data", str(asked))
    found = scores(capsys, str(merged), "--base", str(loud_base), "--data", str(asked))
    assert (found["base"]["exact"], found["adapter"]["exact"]) == (0.0, 1.0)
    assert found["base"]["loss"] == apart["base"]["loss"]
    assert found["adapter"]["loss"] == pytest.approx(apart["adapter"]["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("config", "expected"), [({"dtype": "float16"}, "float32"), ({"torch_dtype": "bfloat16"}, "auto")]
)
def test_a_merged_model_is_computed_in_a_type_that_holds_it(
    tmp_path: Path, config: dict[str, str], expected: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert computed_in(tmp_path) == expected


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[httpx.Request], httpx.Response]], None]:
    """A server of one function, behind httpx itself."""

    def install(handle: Callable[[httpx.Request], httpx.Response]) -> None:
        monkeypatch.setattr(httpx, "Client", partial(httpx.Client, transport=httpx.MockTransport(handle)))

    return install


def test_a_server_is_asked_for_both_greedily_and_with_the_key(
    tmp_path: Path, answering: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []

    def handle(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        seen.append((request.headers["authorization"], body))
        said = "Ahoy!" if body["model"] == "sailor@2" and body["messages"][-1]["content"] == "Hello" else "What?"
        way = {"x-loraplex-path": "merged" if body["model"] else "base"}
        return httpx.Response(200, headers=way, json={"choices": [{"message": {"content": said}}]})

    answering(handle)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    command = ("sailor@2", "--server", "http://server/", "--api-key", "secret", "--data", str(tmp_path / "rows.jsonl"))
    found = scores(capsys, *command)
    assert (found["base"]["exact"], found["adapter"]["exact"]) == (0.0, 0.25)
    assert found["adapter"]["loss"] is None
    assert (found["base"]["ways"], found["adapter"]["ways"]) == ({"base": 4}, {"merged": 4})
    assert [body["model"] for _, body in seen] == [""] * 4 + ["sailor@2"] * 4
    assert {key for key, _ in seen} == {"Bearer secret"}
    assert {(body["temperature"], body["max_tokens"]) for _, body in seen} == {(0, TOKENS)}
    assert all(message["role"] != "assistant" for _, body in seen for message in body["messages"])


def test_a_name_that_the_server_does_not_know_is_told(
    tmp_path: Path, answering: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    answering(lambda request: httpx.Response(404, json={"error": {"message": "no such model", "code": "x"}}))
    (tmp_path / "rows.jsonl").write_text(ROWS)
    assert main(["eval", "nobody", "--server", "http://server", "--data", str(tmp_path / "rows.jsonl")]) == 1
    assert "answered 404: no such model" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("arguments", [["nowhere", "--base", "{base}"], ["nowhere"]])
def test_an_adapter_or_a_base_that_is_missing_exits_2(tmp_path: Path, small_base: Path, arguments: list[str]) -> None:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    words = [word.format(base=small_base) for word in arguments]
    assert main(["eval", *words, "--data", str(tmp_path / "rows.jsonl")]) == 2
