"""A fetch ends at the gate like an upload, or leaves nothing: stopped, too slow, refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.errors import (
    ChecksumMismatch,
    InvalidAdapter,
    JobCancelled,
    SourceRefused,
    SourceUnavailable,
    UploadError,
)
from adapters.sources.address import Policy, parse
from adapters.sources.fetch import Progress, admit
from adapters.upload import UploadLimits, UploadOptions
from tests.adapters.conftest import Shop
from tests.adapters.factories import AdapterFiles, lora_config, tar
from tests.adapters.web_server import WebServer, files_at, serving

LIMITS = UploadLimits(max_bytes=1 << 20, max_files=50)
GOOD = AdapterFiles().files()
DORA = AdapterFiles(config=lora_config(alora_invocation_tokens=[1])).files()


@pytest.fixture
def web() -> Iterator[WebServer]:
    with serving(files_at({"/good.tar.gz": tar(GOOD), "/bad.tar.gz": tar(DORA), "/broken.zip": b"PK"})) as server:
        yield server


def test_an_archive_at_a_url_is_the_same_version_as_its_files_and_remembers_where_it_came_from(
    shop: Shop, web: WebServer
) -> None:
    policy = Policy(roots=(web.url,))
    source = parse(f"{web.url}/good.tar.gz?signature=swordfish")
    version, created = admit(source, "a", shop.ingest, policy, LIMITS, UploadOptions(description="fetched", by="me"))
    assert created
    assert version.manifest.lineage == {"source": {"url": f"{web.url}/good.tar.gz?…"}}
    assert shop.registry.adapter("a").description == "fetched"
    assert shop.ingest.upload("a", AdapterFiles().uploads()) == (version, False)


def test_a_directory_is_the_same_version_too(shop: Shop, tmp_path: Path) -> None:
    root = AdapterFiles().write(tmp_path / "root" / "run")
    version, _ = admit(parse(f"file://{root}"), "a", shop.ingest, Policy(roots=(str(root.parent),)), LIMITS)
    assert shop.ingest.upload("a", AdapterFiles().uploads()) == (version, False)


def refused(shop: Shop, web: WebServer, name: str, error: type[Exception], **options: object) -> Exception:
    before = shop.contents()
    with pytest.raises(error) as raised:
        admit(parse(f"{web.url}/{name}"), "a", shop.ingest, Policy(roots=(web.url,)), LIMITS, **options)  # type: ignore[arg-type]
    assert shop.contents() == before
    assert shop.registry.adapters() == []
    assert list((shop.root / "staging").iterdir()) == []
    return raised.value


def test_what_the_gate_refuses_leaves_nothing(shop: Shop, web: WebServer) -> None:
    fetched = refused(shop, web, "bad.tar.gz", InvalidAdapter)
    with pytest.raises(InvalidAdapter) as uploaded:
        shop.ingest.upload("a", AdapterFiles(config=lora_config(alora_invocation_tokens=[1])).uploads())
    assert str(fetched) == str(uploaded.value)


def test_what_is_no_archive_leaves_nothing(shop: Shop, web: WebServer) -> None:
    refused(shop, web, "broken.zip", UploadError)


def test_another_sha256_leaves_nothing(shop: Shop, web: WebServer) -> None:
    refused(shop, web, "good.tar.gz", ChecksumMismatch, options=UploadOptions(sha256="0" * 64))


def test_what_its_watcher_stops_leaves_nothing(shop: Shop, web: WebServer) -> None:
    seen: list[Progress] = []

    def stop(progress: Progress) -> None:
        seen.append(progress)
        raise JobCancelled("asked to stop")

    refused(shop, web, "good.tar.gz", JobCancelled, watch=stop)
    assert len(seen) == 1


def test_what_takes_too_long_leaves_nothing(shop: Shop, web: WebServer) -> None:
    error = refused(shop, web, "good.tar.gz", SourceUnavailable, timeout_s=0)
    assert getattr(error, "code", "") == "source_timeout"


def test_what_is_closed_is_never_asked(shop: Shop, web: WebServer) -> None:
    with pytest.raises(SourceRefused):
        admit(parse(f"{web.url}/good.tar.gz"), "a", shop.ingest, Policy(("hf", "https")), LIMITS)
    assert web.asked == []
