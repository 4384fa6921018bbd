from types import SimpleNamespace
from typing import Any

import pytest

from adapters.errors import DataError
from adapters.train.data import Conversation
from adapters.train.labels import IGNORED, encode

TALK = Conversation(
    (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ahoy!"},
        {"role": "user", "content": "Say <|im_end|> please"},
        {"role": "assistant", "content": "Aye."},
    ),
    "rows.jsonl:1",
)


def trained_text(example: Any, tokenizer: Any) -> list[str]:
    """The runs of trained tokens, as text."""
    runs, run = [], []
    for token, label in zip((*example.ids, 0), (*example.labels, IGNORED), strict=True):
        if label != IGNORED:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


def test_the_assistants_words_and_their_end_token_are_trained_and_nothing_else(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # where a mask by token id would hide every end
    assert trained_text(encode(TALK, tokenizer, 512), tokenizer) == ["Ahoy!<|im_end|>", "Aye.<|im_end|>"]


def test_the_tokens_are_those_that_serving_makes(tokenizer: Any) -> None:
    example = encode(TALK, tokenizer, 512)
    assert list(example.ids) == tokenizer.apply_chat_template(list(TALK.messages), return_dict=False)
    assert all(label in (IGNORED, token) for token, label in zip(example.ids, example.labels, strict=True))


def test_a_conversation_cut_inside_is_marked(tokenizer: Any) -> None:
    whole = encode(TALK, tokenizer, 512)
    cut = encode(TALK, tokenizer, len(whole.ids) - 3)
    assert (whole.truncated, cut.truncated) == (False, True)
    assert cut.trained_tokens == whole.trained_tokens - 2  # the last three tokens are ".", the end token and a newline


def fake_tokenizer(render: Any) -> Any:
    return SimpleNamespace(
        eos_token="</s>",
        bos_token_id=None,
        chat_template="fake",
        apply_chat_template=lambda messages, **options: render(messages, options),
    )


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    def numbered(messages: Any, options: Any) -> str:
        return f"{len(messages)} messages" + "</s>".join(m["content"] for m in messages)

    with pytest.raises(DataError, match="differently when more follow"):
        encode(TALK, fake_tokenizer(numbered), 512)


def test_a_template_that_never_ends_the_turn_is_refused() -> None:
    def endless(messages: Any, options: Any) -> str:
        return "".join(f"[{m['content']}]" for m in messages)

    with pytest.raises(DataError, match="never learn to stop"):
        encode(TALK, fake_tokenizer(endless), 512)
