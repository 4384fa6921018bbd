"""Told, rest and splice by hand: a stream of one engine that ends in another one's words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from server import continuation
from server.continuation import DONE, Again, Rest, Splice, Told, rest_of
from server.engine.protocol import Endpoint, Stats
from server.errors import EngineUnavailable

PIECES = ["<s>", "Say", " something", "One", " two", " th", "ree"]
PROMPT, ANSWER = [0, 1, 2], [3, 4, 5, 6]
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Say something"}], "stream": True}


def decode(tokens: Sequence[int], skip_special: bool) -> str:
    return "".join(PIECES[token] for token in tokens if token or not skip_special)


def event(chunk: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


def chat_chunk(content: str, **more: Any) -> str:
    choice = {"index": 0, "delta": {"content": content}, "logprobs": None, "finish_reason": None, **more}
    return event(
        {"id": "chat-1", "object": "chat.completion.chunk", "created": 7, "model": "mine", "choices": [choice]}
    )


ROLE = chat_chunk("").replace('"content": ""', '"role": "assistant", "content": ""')


def text_chunk(text: str, **more: Any) -> str:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None, **more}
    return event({"id": "cmpl-2", "object": "text_completion", "created": 9, "model": "mine", "choices": [choice]})


def told(*events: str) -> Told:
    heard = Told()
    for each in events:
        heard.add(each)
    return heard.read()


def rest(body: Mapping[str, Any], text: str, endpoint: Endpoint = "chat", answer: Sequence[int] = ANSWER) -> Rest:
    said = told(ROLE, chat_chunk(text)) if endpoint == "chat" else told(text_chunk(text))
    stats = Stats(prompt_ids=list(PROMPT), generated_ids=list(answer))
    return rest_of(endpoint, body, said, stats, 100, decode)


def chunks(splice: Splice | Again, *events: str) -> list[Any]:
    found = [each for one in events for each in splice.events(one)]
    return [json.loads(each.removeprefix("data: ")) for each in found if each != DONE]


def test_the_rest_begins_behind_the_tokens_that_were_told() -> None:
    asked = rest({**CHAT, "temperature": 0, "max_tokens": 10, "user": "u"}, "One two three")
    assert (asked.kept_tokens, asked.twice) == (4, "")
    assert asked.body == {
        "temperature": 0,
        "user": "u",
        "prompt": [*PROMPT, *ANSWER],
        "max_tokens": 6,
        "stream": True,
    }


@pytest.mark.parametrize(
    ("text", "kept", "twice"),
    [("One two th", 3, ""), ("One two t", 2, " t"), ("One", 1, ""), ("On", 0, "On")],
)
def test_where_text_was_held_back_the_seam_lies_before_it(text: str, kept: int, twice: str) -> None:
    asked = rest(CHAT, text)
    assert (asked.kept_tokens, asked.twice) == (kept, twice)
    assert asked.body["prompt"] == [*PROMPT, *ANSWER[:kept]]


@pytest.mark.parametrize(
    ("endpoint", "limits", "left"),
    [
        ("chat", {}, 100 - 3 - 4),
        ("chat", {"max_tokens": 10}, 6),
        ("chat", {"max_tokens": 50, "max_completion_tokens": 9}, 5),
        ("chat", {"max_tokens": 1000}, 93),
        ("completions", {}, 16 - 4),
        ("completions", {"max_tokens": None}, 93),
        ("completions", {"max_tokens": 7}, 3),
    ],
)
def test_as_many_tokens_are_left_as_the_request_had(endpoint: Endpoint, limits: dict[str, Any], left: int) -> None:
    body = CHAT if endpoint == "chat" else {"prompt": "Say something", "stream": True}
    assert rest({**body, **limits}, "One two three", endpoint).body["max_tokens"] == left


def test_where_only_the_end_was_not_told_the_last_token_comes_again() -> None:
    asked = rest({**CHAT, "max_tokens": 4}, "One two three")
    assert (asked.kept_tokens, asked.twice, asked.body["max_tokens"]) == (3, "ree", 1)


def test_least_tokens_are_those_that_are_still_missing() -> None:
    assert rest({**CHAT, "min_tokens": 6}, "One two three").body["min_tokens"] == 2
    assert rest({**CHAT, "min_tokens": 2}, "One two three").body["min_tokens"] == 0


@pytest.mark.parametrize(
    "more",
    [
        {"n": 2},
        {"best_of": 2},
        {"echo": True},
        {"logprobs": True},
        {"logprobs": 0},
        {"tools": [{"type": "function"}]},
        {"tool_choice": "auto"},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a"}},
        {"presence_penalty": 0.5},
        {"frequency_penalty": -1},
        {"a_field_of_the_future": None},
    ],
)
def test_what_cannot_be_continued_exactly_is_not(more: dict[str, Any]) -> None:
    with pytest.raises(EngineUnavailable, match=f"it was asked with {next(iter(more))}"):
        rest({**CHAT, **more}, "One two three")


@pytest.mark.parametrize("prompt", [["One", "two"], [[1, 2], [3]]])
def test_several_prompts_are_not_continued(prompt: list[Any]) -> None:
    with pytest.raises(EngineUnavailable, match="several prompts"):
        rest({"prompt": prompt}, "One", "completions")


@pytest.mark.parametrize("prompt", ["One", ["One"], [1, 2, 3], [[1, 2]]])
def test_one_prompt_is_continued_however_it_is_written(prompt: Any) -> None:
    assert rest({"prompt": prompt}, "One", "completions").kept_tokens == 1


@pytest.mark.parametrize(
    "more",
    [
        {"chat_template_kwargs": {"x": 1}},
        {"n": 1},
        {"logprobs": False},
        {"tools": []},
        {"response_format": {"type": "text"}},
        {"metadata": {}},
    ],
)
def test_what_changes_nothing_is_no_hindrance(more: dict[str, Any]) -> None:
    assert rest({**CHAT, **more}, "One two three").kept_tokens == 4


def test_calls_of_tools_and_reasoning_are_not_continued() -> None:
    for delta in ({"tool_calls": [{"index": 0}]}, {"reasoning": "Hm"}):
        said = told(ROLE, chat_chunk("", delta=delta))
        assert not said.is_nothing
        with pytest.raises(EngineUnavailable, match="not plain text"):
            rest_of("chat", CHAT, said, Stats(prompt_ids=[1], generated_ids=[3]), 100, decode)


def test_a_chat_goes_on_under_its_id_with_its_shape_and_the_sum_of_its_tokens() -> None:
    said = told(ROLE, chat_chunk("One two"))
    asked = rest_of("chat", CHAT, said, Stats(prompt_ids=PROMPT, generated_ids=ANSWER[:2]), 100, decode)
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    last = {"id": "cmpl-2", "object": "text_completion", "created": 9, "model": "mine", "choices": [], "usage": usage}
    end = text_chunk("ree", finish_reason="stop", stop_reason=None)
    found = chunks(Splice("chat", said, asked), text_chunk(" th"), end, event(last), DONE)
    named = {"id": "chat-1", "object": "chat.completion.chunk", "created": 7, "model": "mine"}
    shape = {"index": 0, "logprobs": None}
    assert found == [
        {**named, "choices": [{**shape, "delta": {"content": " th"}, "finish_reason": None}]},
        {**named, "choices": [{**shape, "delta": {"content": "ree"}, "finish_reason": "stop", "stop_reason": None}]},
        {**named, "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}},
    ]


def test_a_completion_goes_on_under_its_id() -> None:
    said = told(text_chunk("One").replace("cmpl-2", "cmpl-1").replace('"created": 9', '"created": 7'))
    asked = rest_of("completions", {"prompt": "x"}, said, Stats(prompt_ids=PROMPT, generated_ids=[3]), 100, decode)
    (found,) = chunks(Splice("completions", said, asked), text_chunk(" two"))
    assert (found["id"], found["created"], found["object"]) == ("cmpl-1", 7, "text_completion")
    assert found["choices"][0]["text"] == " two"


@pytest.mark.parametrize("pieces", [[" th", "ree"], [" three"], [" ", "t", "hree"]])
def test_what_is_told_twice_is_heard_once(pieces: list[str]) -> None:
    said = told(chat_chunk("One two t"))
    splice = Splice("chat", said, Rest({}, 2, " t"))
    found = chunks(splice, *(text_chunk(piece) for piece in pieces), text_chunk("", finish_reason="stop"))
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in found) == "hree"
    assert all(chunk["choices"][0]["delta"]["content"] for chunk in found[:-1])
    assert found[-1]["choices"][0]["finish_reason"] == "stop"


def test_an_engine_that_goes_on_differently_is_not_believed() -> None:
    said = told(chat_chunk("One two t"))
    with pytest.raises(EngineUnavailable, match="goes on differently"):
        chunks(Splice("chat", said, Rest({}, 2, " t")), text_chunk(" four"))
    with pytest.raises(EngineUnavailable, match="ends it sooner"):
        chunks(Splice("chat", said, Rest({}, 2, " t")), text_chunk(" ", finish_reason="length"))


def test_errors_and_the_end_pass_through() -> None:
    splice = Splice("chat", told(chat_chunk("One")), Rest({}, 1, ""))
    error = event({"error": {"message": "no"}})
    assert [*splice.events(error), *splice.events(DONE)] == [error, DONE]


def test_an_answer_that_had_said_nothing_is_told_anew_under_the_first_id_and_without_its_role() -> None:
    said = told(ROLE)
    assert said.is_nothing
    second = [
        part.replace("chat-1", "chat-2").replace('"created": 7', '"created": 9') for part in (ROLE, chat_chunk("One"))
    ]
    found = chunks(Again(said), *second, DONE)
    assert [(chunk["id"], chunk["created"], chunk["choices"][0]["delta"]) for chunk in found] == [
        ("chat-1", 7, {"content": "One"})
    ]


def test_an_answer_of_which_nothing_was_sent_is_the_second_one_as_it_is() -> None:
    events = [ROLE, chat_chunk("One"), DONE]
    assert [each for one in events for each in Again(told()).events(one)] == events


def test_a_long_stream_is_not_kept_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuation, "FOLD_AT", 3)
    heard = Told()
    for _ in range(10):
        heard.add(chat_chunk("a"))
        assert len(heard._unread) < 3
    assert heard.read().text == "a" * 10
