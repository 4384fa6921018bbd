"""Which addresses are understood, which are open, and that none repeats a secret."""

from __future__ import annotations

import pytest

from adapters.errors import SourceError, SourceRefused
from adapters.sources.address import Policy, Source, check_protocol, check_root, parse, shown


@pytest.mark.parametrize(
    ("text", "protocol", "rest"),
    [
        ("hf://org/name@v1/sub", "hf", "org/name@v1/sub"),
        ("s3://bucket/a b".replace(" ", "%20"), "s3", "bucket/a%20b"),
        ("https://host:8443/a.zip?token=x", "https", "host:8443/a.zip?token=x"),
        ("https://[::1]/a.zip", "https", "[::1]/a.zip"),
        ("file:///srv/a", "file", "/srv/a"),
    ],
)
def test_an_address_is_protocol_and_place(text: str, protocol: str, rest: str) -> None:
    assert parse(text) == Source(protocol, rest)


@pytest.mark.parametrize(
    "text",
    [
        *("", "adapter", "/srv/a", "hf:org/name", "hf://", "S3://bucket/a", "://x", "-x://a"),
        *("s3://bucket/a b", "s3://bucket/a\n", "s3://bucket/\x00", "s3://bucket\\a", "https://[::1/a.zip"),
        *("simplecache::s3://b/a", "zip://a.zip::s3://bucket/x", "filecache::file:///etc", "s3://b/a::file:///etc"),
        *("memory://a", "local:///etc/passwd", "data://x", "reference://x", "dir://x", "zip://a", "blockcache://x"),
        *("s3://bucket/../other", "https://host/a/%2e%2e/b.zip", "file:///srv/a/../../etc", "s3://bucket/./a"),
        "s3://" + "x" * 2000,
    ],
)
def test_what_is_no_address_or_a_way_around_is_refused(text: str) -> None:
    with pytest.raises(SourceError) as error:
        parse(text)
    assert error.value.code == "bad_source"


@pytest.mark.parametrize(
    "text",
    ["https://me:swordfish@host/a.zip", "s3://key:swordfish@bucket/a", "ftp://swordfish@h/a", "x y://a:swordfish@b"],
)
def test_a_password_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(SourceError) as error:
        parse(text)
    assert "swordfish" not in error.value.message


def test_a_signature_is_not_shown() -> None:
    source = parse("https://host/a.zip?X-Amz-Signature=swordfish&x=1")
    assert source.shown == "https://host/a.zip?…"
    assert source.last_part == "a.zip"
    assert shown("could not read https://me:swordfish@host/x?swordfish now") == "could not read https://…@host/x?… now"


OPEN = Policy(("hf", "https"), ("/srv/adapters", "s3://models/adapters/", "http://internal:8080/a"))


@pytest.mark.parametrize(
    "text",
    [
        *("hf://any/thing", "https://anywhere/a.zip", "file:///etc/passwd"),  # what a file is, local.py says
        *("s3://models/adapters", "s3://models/adapters/run1", "http://internal:8080/a/b.zip"),
    ],
)
def test_what_is_open(text: str) -> None:
    OPEN.require(parse(text))


@pytest.mark.parametrize(
    "text",
    [
        *("s3://models", "s3://models/adaptersX", "s3://other/adapters/run1", "gs://models/adapters/run1"),
        *("http://internal:8080/b.zip", "http://internal:80801/a/b.zip", "http://internal/a/b.zip", "ftp://host/a.zip"),
    ],
)
def test_what_is_closed(text: str) -> None:
    with pytest.raises(SourceRefused, match="source_roots") as error:
        OPEN.require(parse(text))
    assert error.value.code == "source_not_allowed"


def test_without_any_setting_nothing_is_open() -> None:
    for text in ("hf://a/b", "https://host/a.zip", "s3://b/a", "file:///srv/a"):
        with pytest.raises(SourceRefused):
            Policy().require(parse(text))


@pytest.mark.parametrize("name", ["file", "local", "memory", "simplecache", "zip", "reference", "S3", "s3://", ""])
def test_a_protocol_that_no_setting_can_open(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be opened as a whole"):
        check_protocol(name)


@pytest.mark.parametrize("root", ["srv/adapters", "file:///srv", "memory://a", "https://me:pw@host/a", "s3://b/../c"])
def test_a_root_that_is_none(root: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        check_root(root)


@pytest.mark.parametrize("root", ["/srv/adapters", "s3://models/adapters/", "http://10.0.0.1:8080/a"])
def test_roots(root: str) -> None:
    assert check_root(root) == root
    assert check_protocol("s3") == "s3"
