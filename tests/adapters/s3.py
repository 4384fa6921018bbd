"""moto's S3 server on loopback, a real HTTP server, that lives as long as the test session."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import fsspec
import pytest


@contextmanager
def running() -> Iterator[Callable[[], str]]:
    """Gives a function that makes a fresh bucket and returns its URL. The drivers find the server by the environment,
    as they do in production."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        try:
            yield _fresh_bucket
        finally:
            server.stop()


def _fresh_bucket() -> str:
    name = f"b{uuid.uuid4().hex}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"
