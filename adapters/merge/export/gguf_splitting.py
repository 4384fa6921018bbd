"""How a tokenizer.json cuts a text before it merges, by the name that llama.cpp has for the same.

Each name here was compared with llama.cpp on texts that tell them apart (tests/adapters/merge/export).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adapters.errors import NotExportable

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{SIGNS}"
QWEN2 = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{SIGNS}"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = "GPT-2's own expression"
DIGITS = "digits one by one"
KNOWN: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "smaug-bpe",
    ((QWEN2,), False): "qwen2",
    ((TEKKEN,), True): "tekken",
}
"""By the steps, and whether a word that is a token needs no merges (`ignore_merges`)."""


def splitting(document: Mapping[str, Any]) -> str:
    """The value of `tokenizer.ggml.pre`. Raises NotExportable."""
    model = document["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise _unknown(f"its model is {model.get('type')!r}, expected BPE of bytes or sentencepiece's BPE")
    steps = tuple(_steps(document.get("pre_tokenizer")))
    ignores = bool(model.get("ignore_merges"))
    found = KNOWN.get((steps, ignores)) or (KNOWN.get((steps, True)) if not ignores else None)
    if found is None:
        raise _unknown(f"it cuts texts by {list(steps)!r:.300}{' and ignores merges' if ignores else ''}")
    return found


def normalizing(document: Mapping[str, Any]) -> Sequence[str]:
    """What a person should know of it. Raises NotExportable where llama.cpp would read other texts."""
    steps = _flat(document.get("normalizer"), "normalizers")
    names = [step["type"] for step in steps]
    if is_sentencepiece(document) and set(names) <= {"Prepend", "Replace"}:
        return []
    if names == ["NFC"]:
        return ["llama.cpp takes texts as they are written: letters and accents apart are not put together (NFC)"]
    if names:
        raise _unknown(f"it changes texts by {names}")
    return []


def is_sentencepiece(document: Mapping[str, Any]) -> bool:
    """A BPE over characters in which ▁ stands for a space and bytes for what is unknown, as in Llama 2 and Mistral."""
    model = document["model"]
    return bool(model.get("type") == "BPE" and model.get("byte_fallback"))


def starts_with_space(document: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front."""
    for part in (document.get("normalizer"), document.get("pre_tokenizer")):
        for step in _flat(part, "normalizers", "pretokenizers"):
            if step["type"] == "Prepend" or step.get("prepend_scheme") in ("first", "always"):
                return True
            if step.get("add_prefix_space"):
                return True
    return False


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> Iterator[str]:
    for step in _flat(pre_tokenizer, "pretokenizers"):
        kind = step["type"]
        if kind == "Digits" and step.get("individual_digits"):
            yield DIGITS
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            yield from [GPT2] if step.get("use_regex", True) else []
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            yield step["pattern"].get("Regex", str(step["pattern"]))
        else:
            yield str(step)


def _flat(step: Mapping[str, Any] | None, *lists: str) -> Sequence[Mapping[str, Any]]:
    if step is None:
        return []
    inner = [each for name in lists for each in step.get(name) or ()]
    return inner if step["type"] == "Sequence" else [step]


def _unknown(reason: str) -> NotExportable:
    names = ", ".join(sorted(set(KNOWN.values())))
    return NotExportable(
        f"this tokenizer is not written as GGUF here: {reason}. Known are {names} and sentencepiece's BPE; export with "
        "--format hf and convert that with llama.cpp's convert_hf_to_gguf.py",
        code="unknown_tokenizer",
    )
