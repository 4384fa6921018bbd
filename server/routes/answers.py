"""An answer with its ETag, and what a change may expect; the rules are those of server/etags.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Depends, Header, Request
from fastapi.responses import JSONResponse, Response

from server import etags

REVALIDATE = {"cache-control": "private, no-cache"}


def tagged(request: Request, content: dict[str, Any], revision: int | None = None) -> Response:
    """200 with the content, or to a GET of someone who has it already 304."""
    response = JSONResponse(content)
    etag = etags.etag_of(bytes(response.body), revision)
    headers = {"etag": etag, **REVALIDATE}
    if request.method == "GET" and etags.is_unchanged(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    response.headers.update(headers)
    return response


def page(shown: Sequence[dict[str, Any]], key: str, has_more: bool) -> dict[str, Any]:
    """A list, in OpenAI's form. `key`: of what the next page begins after."""
    ids = [each[key] for each in shown]
    return {
        "object": "list",
        "data": shown,
        "has_more": has_more,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
    }


def _expected(if_match: Annotated[str | None, Header()] = None) -> frozenset[int] | None:
    return etags.expected_revisions(if_match)


Expected = Annotated[frozenset[int] | None, Depends(_expected)]
"""The revisions of the adapter at which the caller wants its change; None: any."""
