"""Whether the server's address can be listened on, asked before anything slow is started."""

from __future__ import annotations

import errno
import socket
from contextlib import closing
from typing import Any

from server.errors import SettingsError

NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def require_free(host: str, port: int) -> None:
    """Raises SettingsError when `host` has no address on this machine or `port` is taken; port 0 is always free.

    uvicorn binds after its start-up, when the engine is loading already, and would say so only in the log.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        elsewhere = [error for entry in found if (error := _bind(*entry)) is not None]
        if len(elsewhere) == len(found):
            raise elsewhere[0]
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --host or --port, or stop what "
            "listens there"
        ) from None


def _bind(family: int, kind: int, protocol: int, _: str, address: Any) -> OSError | None:
    """The error when this address is of no interface here, as `::1` where there is no IPv6; others are raised."""
    try:
        with closing(socket.socket(family, kind, protocol)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn does
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno in NOT_HERE:
            return error
        raise
    return None
