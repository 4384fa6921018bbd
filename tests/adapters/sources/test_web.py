"""`https://` and `http://`: an archive from a public address or from a place that the operator named, and no other."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.errors import (
    SourceError,
    SourceForbidden,
    SourceNotFound,
    SourceRefused,
    SourceUnavailable,
    UploadTooLarge,
)
from adapters.sources.address import Policy, parse
from adapters.sources.fetch import Progress, fetch
from adapters.sources.web import is_public
from adapters.upload import UploadLimits
from tests.adapters.factories import AdapterFiles, tar
from tests.adapters.web_server import Answer, WebServer, serving

LIMITS = UploadLimits(max_bytes=1 << 20, max_files=50)
ARCHIVE = tar(AdapterFiles().files())
ELSEWHERE = Policy(("http", "https"))


@pytest.fixture
def web() -> Iterator[WebServer]:
    answers = {
        "/a.tar.gz": Answer(200, ARCHIVE),
        "/short.tar.gz": Answer(200, ARCHIVE, {"content-length": str(len(ARCHIVE) + 9)}),
        "/unsized.tar.gz": Answer(200, ARCHIVE, {"content-length": ""}),
        "/moved.tar.gz": Answer(302, headers={"location": "/a.tar.gz"}),
        "/round.tar.gz": Answer(302, headers={"location": "/round.tar.gz"}),
        "/inwards.tar.gz": Answer(302, headers={"location": "http://169.254.169.254/latest/a.tar.gz"}),
        "/localhost.tar.gz": Answer(307, headers={"location": "http://localhost:1/a.tar.gz"}),
        "/to-file.tar.gz": Answer(301, headers={"location": "file:///etc/passwd"}),
        "/to-hub.tar.gz": Answer(301, headers={"location": "hf://org/name"}),
        "/nowhere.tar.gz": Answer(301),
        "/401.tar.gz": Answer(401),
        "/403.tar.gz": Answer(403),
        "/410.tar.gz": Answer(410),
        "/500.tar.gz": Answer(500, b"swordfish"),
        "/206.tar.gz": Answer(206, b"part"),
    }
    with serving(lambda path, _: answers.get(path.partition("?")[0], Answer(404))) as server:
        yield server


def named(web: WebServer) -> Policy:
    return Policy(roots=(web.url,))


def read(address: str, policy: Policy, into: Path, limits: UploadLimits = LIMITS) -> tuple[bytes, list[Progress]]:
    seen: list[Progress] = []
    (path,) = fetch(parse(address), policy, into, limits, seen.append).files
    return path.read_bytes(), seen


@pytest.mark.parametrize("name", ["a", "moved"])
def test_an_archive_of_a_named_place(web: WebServer, tmp_path: Path, name: str) -> None:
    content, seen = read(f"{web.url}/{name}.tar.gz?signature=x", named(web), tmp_path)
    assert content == ARCHIVE
    assert web.asked.count(f"/{name}.tar.gz?signature=x") == 1
    assert seen[-1] == Progress(len(ARCHIVE), len(ARCHIVE), f"{name}.tar.gz")


@pytest.mark.parametrize("name", ["inwards", "localhost", "to-file", "to-hub"])
def test_a_redirect_leads_to_nothing_that_is_closed(web: WebServer, tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceRefused):
        read(f"{web.url}/{name}.tar.gz", named(web), tmp_path)
    with pytest.raises(SourceRefused):
        read(f"{web.url}/{name}.tar.gz", Policy(("http",), (web.url,)), tmp_path)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("401", SourceForbidden),
        ("403", SourceForbidden),
        ("404", SourceNotFound),
        ("410", SourceNotFound),
        ("500", SourceUnavailable),
        ("206", SourceUnavailable),
        ("round", SourceUnavailable),
        ("nowhere", SourceUnavailable),
        ("short", SourceUnavailable),
    ],
)
def test_what_goes_wrong_there_is_told_without_the_signature(
    web: WebServer, tmp_path: Path, name: str, error: type[SourceError]
) -> None:
    with pytest.raises(error) as raised:
        read(f"{web.url}/{name}.tar.gz?swordfish", named(web), tmp_path)
    assert "swordfish" not in raised.value.message


def test_it_must_be_an_archive(web: WebServer, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no archive"):
        read(f"{web.url}/adapter", named(web), tmp_path)
    assert web.asked == []


def test_a_declared_length_above_the_limit_is_refused_before_it_is_read(web: WebServer, tmp_path: Path) -> None:
    with pytest.raises(UploadTooLarge, match="the limit is 100"):
        read(f"{web.url}/a.tar.gz", named(web), tmp_path, UploadLimits(max_bytes=100))
    assert list(tmp_path.iterdir()) == []


def test_an_undeclared_length_is_counted_while_it_is_read(web: WebServer, tmp_path: Path) -> None:
    with pytest.raises(UploadTooLarge, match="sends more than 100 bytes"):
        read(f"{web.url}/unsized.tar.gz", named(web), tmp_path, UploadLimits(max_bytes=100))


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "[::1]", "169.254.169.254", "10.0.0.1", "192.168.1.1", "172.16.0.1", "0.0.0.0"),
        *(
            "[::ffff:127.0.0.1]",
            "[::ffff:169.254.169.254]",
            "[fe80::1]",
            "[fd00::1]",
            "100.64.0.1",
            "2130706433",
            "0x7f.1",
        ),
    ],
)
def test_a_private_address_is_refused_before_anyone_is_called(web: WebServer, tmp_path: Path, host: str) -> None:
    port = web.url.rpartition(":")[2]
    with pytest.raises(SourceRefused, match="not a public address"):
        read(f"http://{host}:{port}/a.tar.gz", ELSEWHERE, tmp_path)
    assert web.asked == []


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
        ("2001:0:7f00:1::", False),
        ("224.0.0.1", False),
        ("fe80::1%eth0", False),
        ("198.18.0.1", False),
        ("255.255.255.255", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_a_host_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match="no host"):
        read("https://no-such-host.invalid/a.zip", ELSEWHERE, tmp_path)


def test_a_port_where_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(SourceUnavailable, match="could not be read"):
            read(f"{url}/a.zip", Policy(roots=(url,)), tmp_path)


def test_another_place_of_the_same_host_is_closed(web: WebServer, tmp_path: Path) -> None:
    with pytest.raises(SourceRefused):
        read(f"{web.url}/a.tar.gz", Policy(roots=(f"{web.url}/below",)), tmp_path)
