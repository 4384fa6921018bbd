"""Random models of each family that is exported, with tokenizers that are trained on a few lines, on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

LINES = [
    "The quick brown fox jumps over 1234 lazy dogs; isn't it? They've said: 3.14159!\n\n  Yes.\t\tNo",
    "Der schnelle braune Fuchs springt über den faulen Hund. Ça va? Привет, мир! 你好，世界 12345",
    "def f(x):\n    return x ** 2  # comment\n\n\n    print('HELLO world'.lower())\r\n\r\n",
    "🚀 emoji 😶‍🌫️ and \u00a0 odd spaces   a'LL we'RE I'm ''quoted'' //path/to/File_Name.txt",
] * 3
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 420


def save_model(path: Path, kind: str = "llama", **changes: Any) -> Path:
    """Two layers, four heads, two of keys; large random weights, so that a wrong order of rows changes everything."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    config = AutoConfig.for_model(kind, **(fields | changes))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases are all 1 and all 0, in which no order shows
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path)
    return path


def save_tokenizer(path: Path, pre_tokenizer: Any = None, *, ignore_merges: bool = False) -> Path:
    """A byte-level BPE that cuts as `pre_tokenizer` does, by default as SmolLM2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    cut = pre_tokenizer or pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 3, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    _save(path, PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    return path


def _save(path: Path, tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<unk>"})
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)


def save_sentencepiece(path: Path, *, prefix: bool = True, first: bool = False) -> Path:
    """A BPE over characters with ▁ for spaces and bytes for what is unknown, as Llama 2 and Mistral have it. `first`:
    the space in front is for the beginning of a text only, as in Mistral's later ones."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 3, special_tokens=pieces, limit_alphabet=60, max_token_length=8, show_progress=False
    )
    tokenizer.train_from_iterator([part for line in LINES for part in line.split(" ")], trainer)
    if first:
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = document["added_tokens"][: len(SPECIAL)]
    _save(path, PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(document)), unk_token="<unk>"))
    return path


def save_adapter(base: Path, path: Path, strength: float = 0.6, **options: Any) -> Path:
    """A LoRA on every linear layer, both sides random."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **options)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.mul_(strength)
    adapted.save_pretrained(path)
    return path
