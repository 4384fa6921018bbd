"""A tokenizer as GGUF tells it: tokens with their types, merges or scores, special tokens, the chat template.

llama.cpp has its own code for each way to cut a text before merging; which one is meant is found from the
tokenizer itself, never from a model's name. A way that is not known here is refused: text would become other tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import NotExportable
from adapters.merge.export.gguf_splitting import is_sentencepiece, normalizing, splitting, starts_with_space

if TYPE_CHECKING:
    from gguf import GGUFWriter

SPECIAL = ("bos", "eos", "unk", "pad")
FURTHER_ENDS = ("eot", "eom")
"""Where llama.cpp keeps the other tokens that end an answer."""


@dataclass(frozen=True)
class Vocabulary:
    model: str
    """`gpt2`: merges of bytes. `llama`: sentencepiece's, by scores."""
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    """One of the two is empty."""
    special: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    space_prefix: bool
    chat_template: str | Sequence[Mapping[str, str]] | None
    notes: tuple[str, ...] = ()


def read_vocabulary(model: Path, size: int) -> Vocabulary:
    """`size`: the rows of the embedding; those without a token get a name and are never used. Raises NotExportable."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise NotExportable(
            f"{model.name} has no tokenizer that transformers can load, and a GGUF file holds one: {error}",
            code="unknown_tokenizer",
        ) from error
    if not tokenizer.is_fast:
        raise NotExportable(
            f"the tokenizer of {model.name} is written in Python ({type(tokenizer).__name__}): what it does cannot be "
            "read out of it",
            code="unknown_tokenizer",
        )
    # As it is loaded: transformers puts another way of cutting texts in for some families than tokenizer.json has.
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    sentencepiece = is_sentencepiece(document)
    pre = "default" if sentencepiece else splitting(document)
    special, notes = _special(tokenizer, model)
    notes += normalizing(document)
    merges = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in document["model"]["merges"]]
    tokens, types = _tokens(document, size, sentencepiece)
    first, *rest = tokenizer("a").input_ids
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=() if sentencepiece else tuple(" ".join(_without_spaces(pair)) for pair in merges),
        scores=tuple(_scores(tokens, merges)) if sentencepiece else (),
        special=special,
        adds_bos=bool(rest) and first == special.get("bos"),
        adds_eos=bool(rest) and rest[-1] == special.get("eos"),
        space_prefix=starts_with_space(document),
        chat_template=_chat_template(tokenizer),
        notes=tuple(notes),
    )


def write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _tokens(document: Mapping[str, Any], size: int, sentencepiece: bool) -> tuple[tuple[str, ...], tuple[int, ...]]:
    from gguf import TokenType

    found: dict[int, tuple[str, int]] = {
        number: (token, _type_of(token, document, sentencepiece))
        for token, number in document["model"]["vocab"].items()
    }
    for added in document.get("added_tokens") or ():
        if found.get(added["id"], ("", 0))[1] != TokenType.UNKNOWN:
            kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
            found[added["id"]] = (added["content"], int(kind))
    if max(found) >= size:
        raise NotExportable(
            f"token {max(found)} has no row in the embedding, which has {size}: resize the model to its tokenizer",
            code="unknown_tokenizer",
        )
    rows = [found.get(number, (f"[PAD{number}]", int(TokenType.UNUSED))) for number in range(size)]
    return tuple(token for token, _ in rows), tuple(kind for _, kind in rows)


def _type_of(token: str, document: Mapping[str, Any], sentencepiece: bool) -> int:
    from gguf import TokenType

    if sentencepiece and token == document["model"].get("unk_token"):
        return int(TokenType.UNKNOWN)
    is_byte = sentencepiece and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return int(TokenType.BYTE if is_byte else TokenType.NORMAL)


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> Iterator[float]:
    """sentencepiece merges what has the best score first; a token's is here the place of its first merge."""
    places: dict[str, int] = {}
    for place, pair in enumerate(merges):
        places.setdefault("".join(pair), place)
    yield from (-float(places[token]) if token in places else -float(len(merges)) for token in tokens)


def _without_spaces(pair: Sequence[str]) -> Iterator[str]:
    """Merges are separated by a space, so one that is part of a token is written as bytes are."""
    yield from (part.replace(" ", chr(ord(" ") + 256)) for part in pair)


def _special(tokenizer: Any, model: Path) -> tuple[dict[str, int], list[str]]:
    """Also those that end an answer by generation_config.json: a model that does not stop is the worst of exports."""
    numbers = {name: getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
    found = {name: int(number) for name, number in numbers.items() if number is not None}
    path = model / "generation_config.json"
    ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    others = [end for end in (ends if isinstance(ends, list) else [ends]) if end not in (None, found.get("eos"))]
    if "eos" not in found and others:
        found["eos"] = others.pop(0)
    found |= dict(zip(FURTHER_ENDS, others, strict=False))
    left = others[len(FURTHER_ENDS) :]
    return found, [f"GGUF has no place for so many ends of an answer: {left} are left out"] if left else []


def _chat_template(tokenizer: Any) -> str | Sequence[Mapping[str, str]] | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return None if template is None else str(template)
