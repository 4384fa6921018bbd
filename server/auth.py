"""Authentication as a dependency of every router: deny by default, never by the shape of a path."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Annotated

from fastapi import Depends, Request

from server.errors import AuthenticationFailed, PermissionDenied
from server.keys import ANYONE_ON_LOOPBACK, Caller, KeyRing, Scope


async def caller(request: Request) -> Caller:
    """Who sends this request. Without any key in the ring, everyone on this machine may do everything."""
    keys: KeyRing = request.app.state.keys
    if not keys:
        _refuse_foreign_pages(request)
        return ANYONE_ON_LOOPBACK
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secret:
        raise AuthenticationFailed("no API key; send it as `Authorization: Bearer <key>`", code="missing_api_key")
    known = keys.identify(secret.strip())
    if known is None:
        raise AuthenticationFailed("unknown API key; check it, or ask an admin for a new one")
    return known


def require(scope: Scope) -> Callable[[Caller], Awaitable[Caller]]:
    """A router dependency that lets only callers with `scope` (or `admin`) pass."""

    async def check(known: Annotated[Caller, Depends(caller)]) -> Caller:
        if not known.may(scope):
            raise PermissionDenied(f"key {known.id!r} lacks the scope {scope!r}; it has {sorted(known.scopes)}")
        return known

    return check


def _refuse_foreign_pages(request: Request) -> None:
    """Without keys, a web page in the operator's browser must not reach us through DNS rebinding or a form post."""
    host = (request.url.hostname or "").strip("[]")
    origin = request.headers.get("origin")
    own = {f"{scheme}://{request.headers.get('host', '')}" for scheme in ("http", "https")}
    if not _is_local(host) or (origin is not None and origin not in own):
        raise PermissionDenied(
            f"without API keys only programs on this machine may call (Host {host!r}, Origin {origin!r}); "
            "use http://127.0.0.1 or set an API key",
            code="not_local",
        )


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


Reader = Annotated[Caller, Depends(require("infer"))]
Publisher = Annotated[Caller, Depends(require("publish"))]
Operator = Annotated[Caller, Depends(require("admin"))]
