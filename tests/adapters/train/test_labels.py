import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.errors import DataError
from adapters.train.data import Conversation
from adapters.train.labels import IGNORED, encode, encode_all

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


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("assistant", ["Ahoy!<|im_end|>", "Aye.<|im_end|>"]),
        ("last", ["Aye.<|im_end|>"]),
    ],
)
def test_whose_words_are_trained(tokenizer: Any, train_on: Any, expected: list[str]) -> None:
    assert trained_text(encode(TALK, tokenizer, 512, train_on), tokenizer) == expected


def test_all_trains_every_token_that_is_read(tokenizer: Any) -> None:
    example = encode(TALK, tokenizer, 512, "all")
    assert example.labels[1:] == example.ids[1:] == encode(TALK, tokenizer, 512).ids[1:]
    assert example.labels[0] == IGNORED  # nothing comes before it
    assert [tokenizer.decode(example.ids[end]) for end in example.ends] == ["<|im_end|>", "<|im_end|>"]


def test_an_answer_of_weight_0_is_read_but_not_learnt(tokenizer: Any) -> None:
    first, answer, *rest = TALK.messages
    talk = Conversation((first, {**answer, "weight": 0}, *rest), "x:1")
    example = encode(talk, tokenizer, 512)
    assert trained_text(example, tokenizer) == ["Aye.<|im_end|>"]
    assert example.ids == encode(TALK, tokenizer, 512).ids


def test_a_system_prompt_that_the_template_injects_is_read_as_in_serving(tokenizer: Any) -> None:
    example = encode(TALK, tokenizer, 512)
    text = tokenizer.decode(example.ids)
    assert text.startswith("<|im_start|>system\n")
    given = encode(Conversation(({"role": "system", "content": "Be brief."}, *TALK.messages), "x:1"), tokenizer, 512)
    assert tokenizer.decode(given.ids).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert trained_text(given, tokenizer) == trained_text(example, tokenizer)


COMPLETION = Conversation(
    ({"role": "prompt", "content": "The sea is"}, {"role": "completion", "content": " blue."}), "x:1"
)


def test_of_a_prompt_and_its_completion_only_the_completion_and_its_end_are_trained(tokenizer: Any) -> None:
    example = encode(COMPLETION, tokenizer, 512)
    assert tokenizer.decode(example.ids) == "The sea is blue.<|im_end|>"  # no template
    assert trained_text(example, tokenizer) == [" blue.<|im_end|>"]
    assert encode(COMPLETION, tokenizer, 512, "all").trained_tokens == len(example.ids) - 1


def test_a_text_is_trained_whole_and_a_long_one_in_pieces(tokenizer: Any) -> None:
    text = Conversation(({"role": "text", "content": "The sea is blue. " * 20},), "x:1")
    (whole,) = encode_all([text], tokenizer, 512)
    assert whole.labels == (IGNORED, *whole.ids[1:])
    assert whole.ids[-1] == tokenizer.eos_token_id
    assert whole.ends == (len(whole.ids) - 1,)
    pieces = encode_all([text], tokenizer, 32)
    assert tuple(token for piece in pieces for token in piece.ids) == whole.ids
    assert [bool(piece.ends) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert not any(piece.truncated for piece in pieces)
    assert sum(piece.whole for piece in pieces) == len(whole.ids)


@pytest.fixture
def beginning(tokenizer: Any) -> Any:
    """A tokenizer that puts a BOS in front of every text, with a template that does so as well, as Llama's."""
    from tokenizers.processors import TemplateProcessing

    copied = copy.deepcopy(tokenizer)
    copied.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    copied.chat_template = "<|im_start|>" + copied.chat_template.replace("<|im_start|>", "<|endoftext|>")
    assert copied("x")["input_ids"][0] == copied.bos_token_id == 1
    return copied


def test_bos_is_never_doubled(beginning: Any) -> None:
    for talk in (TALK, COMPLETION):
        example = encode(talk, beginning, 512)
        assert example.ids[0] == 1
        assert example.ids.count(1) == 1
    assert list(encode(TALK, beginning, 512).ids) == beginning.apply_chat_template(
        [dict(message) for message in TALK.messages], return_dict=False
    )


def test_a_bos_written_into_the_data_is_an_error(beginning: Any) -> None:
    doubled = Conversation(({"role": "text", "content": "<|im_start|>The sea"},), "x:7")
    with pytest.raises(DataError, match=r"x:7: begins with '<\|im_start\|>' twice"):
        encode(doubled, beginning, 512)


def test_a_base_without_a_chat_template_learns_texts_and_no_conversations(tokenizer: Any) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    assert encode(COMPLETION, plain, 512).ids == encode(COMPLETION, tokenizer, 512).ids
    with pytest.raises(DataError, match=r"rows.jsonl:1: the base has no chat template"):
        encode(TALK, plain, 512)


def test_a_conversation_that_the_template_refuses_is_an_error_with_its_place(tokenizer: Any) -> None:
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"rows.jsonl:1: the base's chat template refuses .*: roles must alternate"):
        encode(TALK, strict, 512)


def test_a_turn_may_end_with_another_token_that_generation_stops_at(tokenizer: Any, tmp_path: Path) -> None:
    """As Llama 3 and Gemma do it: the tokenizer's own eos is not in the template at all."""
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    gemma = type(tokenizer).from_pretrained(tmp_path)
    gemma.eos_token = "<|endoftext|>"
    assert trained_text(encode(TALK, gemma, 512), gemma) == ["Ahoy!<|im_end|>", "Aye.<|im_end|>"]
    (tmp_path / "other").mkdir()
    gemma.name_or_path = str(tmp_path / "other")
    with pytest.raises(DataError, match=r"end token \(<\|endoftext\|>\), so the model would never learn to stop"):
        encode(TALK, gemma, 512)
