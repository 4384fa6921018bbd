"""`https://`, and `http://` where the operator names it: one archive, by GET. Only to public addresses, checked where
the connection is made, so that no name can resolve to another address in between; a place that the operator named may
be anywhere. Environment proxies are not used: behind one, addresses could not be checked.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from ipaddress import IPv6Address, IPv6Network, ip_address
from urllib.parse import urljoin

import httpcore
import httpx

from adapters.errors import SourceForbidden, SourceNotFound, SourceRefused, SourceUnavailable
from adapters.sources.address import WEB, Policy, Source, parse
from adapters.sources.remote_file import SILENCE_S, Chunks, Listing, RemoteFile, require_archive

REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 5
CONNECT_S = 10.0
NAT64 = IPv6Network("64:ff9b::/96")
TIMEOUTS = {"connect": CONNECT_S, "read": SILENCE_S, "write": SILENCE_S, "pool": CONNECT_S}
# A compressed answer could be a bomb, and its length would not be the file's.
HEADERS = [("user-agent", "loraplex"), ("accept", "*/*"), ("accept-encoding", "identity")]


@contextmanager
def listing(source: Source, policy: Policy) -> Iterator[Listing]:
    """One request for all: an address may be good for one only."""
    name = require_archive(source.last_part)
    with _get(source, policy) as response:
        length = dict(response.headers).get(b"content-length", b"").decode()
        size = int(length) if length.isdecimal() else None
        body = Chunks(response.iter_stream())
        yield Listing((RemoteFile(name, size, lambda: nullcontext(body)),), {"url": source.shown})


@contextmanager
def _get(source: Source, policy: Policy, redirects: int = 0) -> Iterator[httpcore.Response]:
    policy.require(source)
    backend = _Backend(may_be_private=policy.is_below_a_root(source))
    host = httpcore.URL(source.text.partition("#")[0])
    with (
        httpcore.ConnectionPool(ssl_context=httpx.create_ssl_context(), network_backend=backend) as pool,
        pool.stream("GET", host, headers=HEADERS, extensions={"timeout": TIMEOUTS}) as response,
    ):
        if response.status not in REDIRECTS:
            _require_ok(source, response.status)
            yield response
            return
        location = dict(response.headers).get(b"location", b"").decode("ascii", "replace")
    if redirects >= MAX_REDIRECTS:
        raise SourceUnavailable(
            f"{source.shown[:200]} redirects more than {MAX_REDIRECTS} times; give the last address"
        )
    with _get(_redirected(source, location), policy, redirects + 1) as response:
        yield response


def _redirected(source: Source, location: str) -> Source:
    target = parse(urljoin(source.text, location))
    if target.protocol not in WEB or (source.protocol == "https" and target.protocol == "http"):
        raise SourceRefused(
            f"{source.shown[:200]} redirects to {target.shown[:200]}; expected another https:// address"
        )
    return target


def _require_ok(source: Source, status: int) -> None:
    if status == 200:
        return
    place = source.shown[:200]
    if status in (401, 403):
        raise SourceForbidden(f"{place} answers {status}; make it readable, or give an address that is signed")
    if status in (404, 410):
        raise SourceNotFound(f"{place} answers {status}: there is nothing; check the address")
    raise SourceUnavailable(f"{place} answers {status}, expected 200; try again, or check the address")


class _Backend(httpcore.NetworkBackend):
    """Connects to an address that it has looked at, and to no other."""

    def __init__(self, may_be_private: bool) -> None:
        self._may_be_private = may_be_private
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        if self._may_be_private:
            return self._backend.connect_tcp(host, port, timeout, local_address, socket_options)
        return self._backend.connect_tcp(_public_address(host, port), port, timeout, local_address, socket_options)

    def sleep(self, seconds: float) -> None:
        self._backend.sleep(seconds)


def _public_address(host: str, port: int) -> str:
    try:
        found = [str(each[4][0]) for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        raise SourceNotFound(f"there is no host {host[:200]!r}; check the address") from None
    if not found or not all(is_public(address) for address in found):
        raise SourceRefused(
            f"{host[:200]!r} is not a public address, and this server reads no others; its operator can name the place "
            "in source_roots"
        )
    return found[0]


def is_public(address: str) -> bool:
    """Whether it is somebody else's on the internet: not this machine, this network, or a way around to them."""
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in NAT64 or ip.sixtofour is not None or ip.teredo is not None:
            return False
    return ip.is_global and not ip.is_multicast
