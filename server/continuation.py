"""An answer whose engine died, told to its end by another one, as one stream with one id.

The engine's tokens are the seam, not the text: the second engine completes the prompt's tokens and those whose text the
client has, so nothing is tokenised anew and no template is applied twice. Where the engine held text back (half a
character, what may become a stop string) the seam lies before it, and what is told twice must be the same both times.

Only what can be continued exactly is: plain text, one choice. Pure; it knows no engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.engine.protocol import Endpoint, Stats
from server.errors import EngineUnavailable

Decode = Callable[[Sequence[int], bool], str]
"""Tokens, and whether special ones are left out → text."""
DONE = "data: [DONE]\n\n"
ERROR = 'data: {"error"'
FOLD_AT = 512
"""Events that are kept as they are before they are read: an answer seldom has more, and then none is ever read."""
SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "logit_bias", "ignore_eos", "user"),
    *("stop", "stop_token_ids", "include_stop_str_in_output", "min_tokens", "skip_special_tokens", "stream_options"),
)
"""What the second request has from the first as it is."""
RENDERING = (
    *("add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs", "documents"),
    *("add_special_tokens", "reasoning_effort"),
)
"""What only says how the prompt's tokens are made, which are known."""
UNDERSTOOD = {
    *SAMPLING,
    *RENDERING,
    *("model", "messages", "prompt", "stream", "max_tokens", "max_completion_tokens", "metadata", "store"),
}
HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "presence_penalty": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "parallel_tool_calls": (None, True, False),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
}
"""Fields that change nothing with these values (0 is not False: `logprobs: 0` asks for those of the tokens chosen).
With any other, as with a field that stands nowhere here, an answer cannot be continued exactly: penalties, for example,
count only what their own request has generated."""
DEFAULT_COMPLETION_TOKENS = 16


@dataclass
class Told:
    """What a client has of a stream."""

    text: str = ""
    mould: dict[str, Any] | None = None
    """The last chunk with a choice: those to come look like it."""
    empty: int = 0
    """Chunks that said nothing yet, as the first of a chat, which has the role."""
    is_plain: bool = True
    has_ended: bool = False
    _unread: list[str] = field(default_factory=list)

    def add(self, event: str) -> None:
        self._unread.append(event)
        if len(self._unread) >= FOLD_AT:
            self.read()

    def read(self) -> Told:
        """Take in what was only kept."""
        events, self._unread = self._unread, []
        for event in events:
            self._take(event)
        return self

    @property
    def is_nothing(self) -> bool:
        return not self.text and self.is_plain and not self.has_ended

    def _take(self, event: str) -> None:
        if event == DONE:
            return
        chunk = json.loads(event.removeprefix("data: "))
        for choice in chunk.get("choices", ()):
            self.mould = chunk
            said = choice.get("delta", choice)
            text = said.get("content") or said.get("text") or ""
            self.text += text
            self.empty += not text
            self.is_plain = self.is_plain and choice["index"] == 0 and not _says_more(said)
            self.has_ended = self.has_ended or choice.get("finish_reason") is not None


@dataclass(frozen=True)
class Rest:
    """What the second engine is asked, as a text completion."""

    body: Mapping[str, Any]
    kept_tokens: int
    """Of those that the first engine generated."""
    twice: str
    """Text that the client has already, and that the second engine must begin with."""


def rest_of(
    endpoint: Endpoint, body: Mapping[str, Any], told: Told, stats: Stats, max_model_len: int, decode: Decode
) -> Rest:
    """Raises EngineUnavailable where that is not possible."""
    if (why := _why_not(body, told, stats)) is not None:
        raise not_continuable(why)
    skip_special = body.get("skip_special_tokens", True)
    limit = _limit(endpoint, body, max_model_len - len(stats.prompt_ids))
    # One token at least is left: where only the end was not told, the last one is generated again, and why it is last.
    kept, twice = _seam(told.text, stats, limit - 1, lambda tokens: decode(tokens, skip_special))
    carried = {name: body[name] for name in SAMPLING if name in body}
    if "min_tokens" in carried:
        carried["min_tokens"] = max(0, (carried["min_tokens"] or 0) - kept)
    prompt = [*stats.prompt_ids, *stats.generated_ids[:kept]]
    return Rest({**carried, "prompt": prompt, "max_tokens": limit - kept, "stream": True}, kept, twice)


class Splice:
    """Turns the second engine's events into the next ones of the first stream. `kept_tokens` were generated before."""

    def __init__(self, endpoint: Endpoint, told: Told, rest: Rest) -> None:
        self._endpoint = endpoint
        self._mould = told.mould or {}
        self._kept = rest.kept_tokens
        self._twice = rest.twice

    def events(self, event: str) -> Iterator[str]:
        """None, or one. Raises EngineUnavailable where the two engines disagree on what the client has."""
        if event == DONE or event.startswith(ERROR):
            yield event
            return
        chunk = json.loads(event.removeprefix("data: "))
        if chunk.get("usage"):
            chunk["usage"] = self._summed(chunk["usage"])
        for choice in chunk.get("choices", ()):
            had = bool(self._twice)
            choice["text"] = self._news(choice["text"])
            if self._twice and choice.get("finish_reason") is not None:
                raise not_continuable("the second engine ends it sooner")
            if had and not choice["text"] and choice.get("finish_reason") is None:
                return
        yield _event(self._like_the_first(chunk))

    def _news(self, text: str) -> str:
        twice, self._twice = self._twice, self._twice[len(text) :]
        if not text.startswith(twice) and not twice.startswith(text):
            raise not_continuable("the second engine goes on differently")
        return text[len(twice) :]

    def _summed(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        generated = usage["completion_tokens"] + self._kept
        return {
            **usage,
            "prompt_tokens": usage["prompt_tokens"] - self._kept,
            "completion_tokens": generated,
            "total_tokens": usage["total_tokens"],
        }

    def _like_the_first(self, chunk: dict[str, Any]) -> dict[str, Any]:
        named: dict[str, Any] = {
            name: self._mould[name] for name in ("id", "object", "created", "model") if name in self._mould
        }
        if self._endpoint == "completions":
            return {**chunk, **named}
        more: dict[str, Any] = {name: chunk[name] for name in ("usage", "system_fingerprint") if name in chunk}
        return {**named, "choices": [self._as_chat(choice) for choice in chunk.get("choices", ())], **more}

    def _as_chat(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        shape = self._mould["choices"][0]
        end = {name: choice[name] for name in ("finish_reason", "stop_reason") if name in choice}
        return {**shape, "delta": {"content": choice["text"]}, **end}


class Again:
    """The same request, asked again of another engine when nothing had been said: its events under the first id."""

    def __init__(self, told: Told) -> None:
        mould = told.mould or {}
        self._named: dict[str, Any] = {name: mould[name] for name in ("id", "created") if name in mould}
        self._known = told.empty

    def events(self, event: str) -> Iterator[str]:
        if event == DONE or event.startswith(ERROR) or not self._named:
            yield event
            return
        chunk = json.loads(event.removeprefix("data: "))
        if self._known and chunk.get("choices") and not _is_news(chunk):
            self._known -= 1
            return
        yield _event({**chunk, **self._named})


def not_continuable(why: str) -> EngineUnavailable:
    return EngineUnavailable(f"the engine died in the middle of the answer, which cannot be continued exactly: {why}")


def _why_not(body: Mapping[str, Any], told: Told, stats: Stats) -> str | None:
    for name, value in body.items():
        if name not in UNDERSTOOD and not any(
            value == each and type(value) is type(each) for each in HARMLESS.get(name, ())
        ):
            return f"it was asked with {name}"
    if isinstance(prompt := body.get("prompt"), list) and len(prompt) > 1 and not isinstance(prompt[0], int):
        return "it has several prompts"
    if not told.is_plain:
        return "it is not plain text"
    if told.has_ended or not stats.prompt_ids:
        return "its tokens are not known"
    return None


def _seam(text: str, stats: Stats, most: int, decode: Callable[[Sequence[int]], str]) -> tuple[int, str]:
    """How many tokens say no more than `text`, and what of it they do not say."""
    before = len(decode(stats.prompt_ids))
    for kept in range(min(len(stats.generated_ids), most), 0, -1):
        said = decode([*stats.prompt_ids, *stats.generated_ids[:kept]])[before:]
        if text.startswith(said):
            return kept, text[len(said) :]
    return 0, text


def _limit(endpoint: Endpoint, body: Mapping[str, Any], room: int) -> int:
    """How many tokens the answer may have in all."""
    asked = body.get("max_tokens")
    if endpoint == "chat":
        asked = body.get("max_completion_tokens") or asked
    elif "max_tokens" not in body:
        asked = DEFAULT_COMPLETION_TOKENS
    return min(asked or room, room)


def _says_more(said: Mapping[str, Any]) -> bool:
    """Reasoning, calls of tools: whatever is beside role and content."""
    known = ("role", "content", "text", "index", "finish_reason", "stop_reason", "token_ids", "prompt_token_ids")
    return any(value for name, value in said.items() if name not in known)


def _is_news(chunk: Mapping[str, Any]) -> bool:
    choice = chunk["choices"][0]
    said = choice.get("delta", choice)
    return bool(said.get("content") or said.get("text") or choice.get("finish_reason") or _says_more(said))


def _event(chunk: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
