"""The unmodified OpenAI client against the real engine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.flows.live import KEY, Live

pytestmark = pytest.mark.engine
CAPITAL: Any = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.server.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def test_base_and_two_adapters_answer_the_same_question_differently(client: openai.OpenAI, live: Live) -> None:
    texts = {}
    for model in (live.base.name, "pirate", "ticket"):
        answer = client.chat.completions.create(model=model, messages=CAPITAL, max_tokens=48, temperature=0)
        assert answer.model == model
        assert answer.usage is not None
        assert answer.usage.prompt_tokens + answer.usage.completion_tokens == answer.usage.total_tokens
        texts[model] = answer.choices[0].message.content or ""
    assert "Paris" in texts[live.base.name]
    assert len(set(texts.values())) == 3
    assert json.loads(texts["ticket"]).keys() == {"topic", "answer", "confidence"}


def test_a_stream_adds_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="pirate", messages=CAPITAL, max_tokens=24, temperature=0)
    with client.chat.completions.create(
        model="pirate",
        messages=CAPITAL,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert {chunk.model for chunk in chunks} == {"pirate"}
    assert chunks[-1].usage == whole.usage


def test_n_stop_and_seed(client: openai.OpenAI, live: Live) -> None:
    options: dict[str, Any] = {"model": live.base.name, "messages": CAPITAL, "max_tokens": 16}
    first = client.chat.completions.create(**options, n=3, temperature=1.0, seed=7)
    again = client.chat.completions.create(**options, n=3, temperature=1.0, seed=7)
    assert [choice.message.content for choice in first.choices] == [choice.message.content for choice in again.choices]
    assert len({choice.message.content for choice in first.choices}) > 1
    stopped = client.chat.completions.create(**options, temperature=0, stop=["Paris"])
    assert "Paris" not in (stopped.choices[0].message.content or "")
    assert stopped.choices[0].finish_reason == "stop"


def test_logprobs_are_those_of_the_greedy_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="ticket", messages=CAPITAL, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2
    )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert len(found.content) == 8
    for token in found.content:
        assert token.logprob == max(top.logprob for top in token.top_logprobs) <= 0


def test_a_json_schema_is_obeyed(client: openai.OpenAI, live: Live) -> None:
    answer = client.chat.completions.create(
        model=live.base.name,
        messages=[{"role": "user", "content": "Invent a person."}],
        max_tokens=60,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}},
    )
    person = json.loads(answer.choices[0].message.content or "")
    assert person.keys() == {"name", "age"}
    assert isinstance(person["age"], int)


def test_a_regex_is_obeyed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="pirate",
        messages=[{"role": "user", "content": "Give me a date."}],
        max_tokens=20,
        temperature=0,
        extra_body={"structured_outputs": {"regex": r"\d{4}-\d{2}-\d{2}"}},
    )
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", answer.choices[0].message.content or "")


def test_a_required_tool_is_called_with_arguments_of_its_schema(client: openai.OpenAI, live: Live) -> None:
    answer = client.chat.completions.create(
        model=live.base.name,
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[WEATHER],
        tool_choice="required",
        max_tokens=80,
        temperature=0,
    )
    calls = answer.choices[0].message.tool_calls or []
    assert [call.function.name for call in calls if call.type == "function"][:1] == ["get_weather"]
    first = calls[0]
    assert first.type == "function"
    assert json.loads(first.function.arguments).keys() == {"city"}


def test_completions(client: openai.OpenAI, live: Live) -> None:
    answer = client.completions.create(
        model=live.base.name, prompt=["The sea is", "One plus one is"], max_tokens=5, temperature=0, logprobs=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.token_logprobs or []) == 5
    with client.completions.create(
        model=live.base.name, prompt="The sea is", max_tokens=5, temperature=0, stream=True
    ) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_models_lists_the_base_and_every_adapter(client: openai.OpenAI, live: Live) -> None:
    models = {model.id: model for model in client.models.list()}
    assert {live.base.name, "pirate", "ticket", "random4", "random8", "random16"} <= models.keys()
    assert client.models.retrieve("pirate").id == "pirate"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_errors_reach_the_client_as_its_own_classes(client: openai.OpenAI, live: Live) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="nobody", messages=CAPITAL)
    assert unknown.value.code == "model_not_found"
    assert unknown.value.param == "model"
    assert unknown.value.request_id
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="pirate", messages=CAPITAL, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.chat.completions.create(model="pirate", messages=[{"role": "user", "content": "sea " * 4000}])
    with openai.OpenAI(base_url=f"{live.server.url}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.chat.completions.create(model="pirate", messages=CAPITAL)
