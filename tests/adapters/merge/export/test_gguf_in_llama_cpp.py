"""Every family and every way of cutting texts that is exported, in llama.cpp itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from adapters.base import BaseModel
from adapters.errors import NotTheSame
from adapters.merge.export import llama_cpp
from adapters.merge.export.gguf_model import plan_gguf, write_model
from adapters.merge.export.gguf_splitting import LLAMA3, QWEN2, TEKKEN
from adapters.merge.export.origin import Origin
from adapters.merge.export.parity import compare
from tests.adapters.merge.export.tiny import LINES, TEMPLATE, VOCABULARY, save_model, save_sentencepiece, save_tokenizer

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: uv pip install xllamacpp")

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied with biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama 3's rope": ("llama", {"max_position_embeddings": 8192, "rope_parameters": LLAMA3_ROPE}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}
TEXTS = [
    *LINES[:4],
    "Hello world",
    "a<tool>b <|im_end|> c\n<|im_start|>user",
    "日本語 テキスト 123",
    "ÀÉÎ ßẞ x²½ ١٢٣ ٣.٤ HTMLParser CamelCaseWORD",
    "don't DON'T we'Ve l'homme’s",
    "\n\n \n x",
    "\t\tab\n",
    "{}[]()<>@#$%^&*",
    "  leading and trailing   ",
]


def gguf_of(model: Path) -> Path:
    path = model / "model.gguf"
    write_model(plan_gguf(BaseModel.read(model), "f32", Origin("tiny")), path)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_computes(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    kind, changes = FAMILIES[family]
    model = save_tokenizer(save_model(tmp_path, kind, **changes))
    tokens = [1, *np.random.default_rng(0).integers(5, 400, 40).tolist()]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        rows = torch.log_softmax(loaded(torch.tensor([tokens])).logits[0, :-1], dim=-1).numpy()

    with llama_cpp.loaded(gguf_of(model), VOCABULARY) as export:
        found = np.stack([export.log_probabilities(tokens[:end]) for end in range(1, len(tokens))])
    parity = compare(rows, found, tokens[1:])

    assert parity.source_loss > 6  # random and far from uniform: another order of anything would be nats away
    assert parity.kl < 1e-5
    assert parity.largest_change < 0.03  # its cache of keys and values is f16


def cut_by(expression: str) -> Any:
    split = pre_tokenizers.Split(Regex(expression), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


WAYS: dict[str, tuple[Any, bool]] = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    "smollm": (None, False),
    "llama-bpe": (cut_by(LLAMA3), True),
    "smaug-bpe": (cut_by(LLAMA3), False),
    "qwen2": (cut_by(QWEN2), False),
    "tekken": (cut_by(TEKKEN), True),
}


def check_tokens(model: Path, pre: str, texts: list[str]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    assert plan_gguf(BaseModel.read(model), "f32", Origin("tiny")).vocabulary.pre == pre
    with llama_cpp.loaded(gguf_of(model), VOCABULARY) as export:
        assert [export.tokens(text) for text in texts] == [tokenizer(text).input_ids for text in texts]


@pytest.mark.parametrize("pre", WAYS)
def test_texts_become_the_same_tokens(pre: str, tmp_path: Path) -> None:
    cut, ignores = WAYS[pre]
    check_tokens(save_tokenizer(save_model(tmp_path), cut, ignore_merges=ignores), pre, TEXTS)


def test_a_token_that_begins_every_text_is_put_there(tmp_path: Path) -> None:
    model = save_tokenizer(save_model(tmp_path))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    tokenizer.save(str(model / "tokenizer.json"))
    check_tokens(model, "smollm", ["Hello", "<|im_start|>"])


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_by_scores_too(prefix: bool, tmp_path: Path) -> None:
    texts = [text for text in TEXTS if "<tool>" not in text]  # with a space in front, transformers never finds it
    check_tokens(save_sentencepiece(save_model(tmp_path), prefix=prefix), "default", texts)


def test_the_chat_template_and_the_end_of_an_answer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = save_tokenizer(save_model(tmp_path))
    chat = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "?"},
    ]
    expected = AutoTokenizer.from_pretrained(model).apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    with llama_cpp.loaded(gguf_of(model), VOCABULARY) as export:
        assert export.rendered(chat) == expected
    assert TEMPLATE.startswith("{% for")


def test_a_file_that_is_cut_is_an_error_with_llama_cpps_own_words(tmp_path: Path) -> None:
    model = save_tokenizer(save_model(tmp_path))
    whole = gguf_of(model)
    whole.write_bytes(whole.read_bytes()[:-4096])
    with (
        pytest.raises(NotTheSame, match=r"cannot load model\.gguf: (.|\n)*(corrupted|incomplete|bounds)"),
        llama_cpp.loaded(whole, VOCABULARY),
    ):
        pass
