"""Asks a running server the questions of a data file, over OpenAI's chat endpoint, greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from adapters.errors import RemoteRefusal, RemoteUnreachable

AT_ONCE = 8
TIMEOUT_S = 600.0
WAY = "x-loraplex-path"


@dataclass(frozen=True)
class Reply:
    text: str
    way: str | None
    """`base`, `lora` or `merged`, as the server says it; None of a server that says nothing of the kind."""


def ask(
    server: str,
    model: str,
    chats: Sequence[Sequence[Any]],
    max_tokens: int,
    api_key: str | None,
    told: Callable[[], None] = lambda: None,
) -> list[Reply]:
    """The answers, in the order of the chats. Raises RemoteRefusal or RemoteUnreachable for the first that has none."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    url = f"{server.rstrip('/')}/v1/chat/completions"
    with (
        httpx.Client(headers=headers, timeout=TIMEOUT_S) as client,
        ThreadPoolExecutor(AT_ONCE, thread_name_prefix="ask") as pool,
    ):

        def one(chat: Sequence[Any]) -> Reply:
            body = {"model": model, "messages": list(chat), "max_tokens": max_tokens, "temperature": 0}
            answer = _answer(client, url, body)
            told()
            return answer

        return list(pool.map(one, chats))


def _answer(client: httpx.Client, url: str, body: dict[str, Any]) -> Reply:
    try:
        response = client.post(url, json=body)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise RemoteUnreachable(
            f"{url} did not answer ({error}); check the address and that the server is up"
        ) from error
    try:
        content = response.json()
        if response.is_success:
            text = str(content["choices"][0]["message"]["content"] or "").strip()
            return Reply(text, response.headers.get(WAY))
        message, code = str(content["error"]["message"]), content["error"].get("code")
    except (ValueError, KeyError, IndexError, TypeError):
        message, code = f"something that is no chat completion: {response.text[:200]}", None
    raise RemoteRefusal(f"{url} answered {response.status_code}: {message}", code=code, status=response.status_code)
