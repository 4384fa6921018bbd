"""What two answers are compared by: whole or streamed, text or tools, and what is kept of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.shadow_tally import EXAMPLES, Said, Tally, first_difference, prompt_sha256, read_body, read_events


def chunk(index: int = 0, finish: str | None = None, **delta: Any) -> str:
    return f"data: {json.dumps({'choices': [{'index': index, 'delta': delta, 'finish_reason': finish}]})}\n\n"


DONE = "data: [DONE]\n\n"


def said(*texts: str, finish: str = "stop", total_s: float = 1.0, ttft_s: float | None = 0.5) -> Said:
    return Said(texts, (finish,) * len(texts), ttft_s, total_s)


def test_a_stream_says_what_the_whole_says() -> None:
    body = {
        "choices": [
            {"index": 1, "message": {"content": "two"}, "finish_reason": "length"},
            {"index": 0, "message": {"content": "one more"}, "finish_reason": "stop"},
        ]
    }
    stream = [
        chunk(content="one "),
        chunk(1, content="two"),
        chunk(content="more"),
        chunk(1, "length"),
        chunk(0, "stop"),
    ]
    usage = 'data: {"choices": [], "usage": {"total_tokens": 7}}\n\n'
    whole = read_body(body, 0.5, 1.0)
    assert whole == Said(("one more", "two"), ("stop", "length"), 0.5, 1.0)
    assert read_events([*stream, usage, DONE], 0.5, 1.0) == whole


def test_tools_are_compared_without_their_ids() -> None:
    def call(identifier: str, name: str | None, arguments: str, index: int = 0) -> dict[str, Any]:
        return {"index": index, "id": identifier, "function": {"name": name, "arguments": arguments}}

    whole = {"content": None, "tool_calls": [call("x", "find", '{"a": 1}'), call("y", "stop", "{}")]}
    body = {"choices": [{"index": 0, "message": whole, "finish_reason": "tool_calls"}]}
    stream = [
        chunk(tool_calls=[call("p", "find", '{"a"')]),
        chunk(tool_calls=[call("q", None, ": 1}"), call("r", "stop", "{}", 1)]),
        chunk(0, "tool_calls"),
        DONE,
    ]
    assert read_events(stream, None, 1.0) == read_body(body, None, 1.0)
    assert read_body(body, None, 1.0).texts == ('find{"a": 1}stop{}',)


def test_text_completions_are_read_too() -> None:
    body = {"choices": [{"index": 0, "text": "one", "finish_reason": "stop"}]}
    stream = [f"data: {json.dumps({'choices': [{'index': 0, 'text': 'one', 'finish_reason': 'stop'}]})}\n\n", DONE]
    assert read_events(stream, 0.5, 1.0) == read_body(body, 0.5, 1.0) == said("one")


@pytest.mark.parametrize(
    "events",
    [
        [],
        [DONE],
        [chunk(content="cut")],
        [chunk(content="x"), 'data: {"error": {"code": "adapter_deleted"}}\n\n', DONE],
    ],
)
def test_half_an_answer_is_none(events: list[str]) -> None:
    assert read_events(events, None, 1.0) is None


@pytest.mark.parametrize(
    ("one", "other", "position"),
    [
        (said("same"), said("same", finish="length"), None),
        (said("abcd"), said("abxd"), 2),
        (said("abc"), said("abcd"), 3),
        (said(""), said("x"), 0),
        (said("ab", "cd"), said("ab", "cx"), 4),
    ],
)
def test_where_two_part(one: Said, other: Said, position: int | None) -> None:
    assert first_difference(one, other) == position


def test_a_tally_sums_up() -> None:
    tally = Tally(4)
    body = {"messages": [{"role": "user", "content": "a secret"}], "seed": 7}
    assert tally.add(body, said("abcd"), said("abcd", total_s=2.0))
    assert not tally.add(body, said("abcd"), said("abXXXX", finish="length", ttft_s=None))
    shown = tally.to_json()
    assert {key: shown[key] for key in ("compared", "agreed", "agreement", "same_finish")} == {
        "compared": 2,
        "agreed": 1,
        "agreement": 0.5,
        "same_finish": 1,
    }
    assert (shown["length_ratio"], shown["latency_ratio"], shown["ttft_ratio"]) == (1.25, 1.5, 1.0)
    (example,) = shown["examples"]
    del example["at"]
    assert example == {
        "prompt_sha256": prompt_sha256({"messages": body["messages"]}),
        "first_difference": 2,
        "lengths": [4, 6],
        "finish_reasons": [["stop"], ["length"]],
    }
    assert "secret" not in json.dumps(shown)
    assert "abXX" not in json.dumps(shown)


def test_a_tally_keeps_the_last_few_examples() -> None:
    tally = Tally(4)
    assert tally.to_json()["agreement"] is None
    for number in range(EXAMPLES + 3):
        tally.add({"prompt": str(number)}, said("a"), said("b"))
    kept = [example["prompt_sha256"] for example in tally.to_json()["examples"]]
    assert kept == [prompt_sha256({"prompt": str(number)}) for number in range(EXAMPLES + 2, 2, -1)]
