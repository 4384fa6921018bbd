"""`file://`: what lies inside the named directories, whole; nothing outside, by whatever way."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from adapters.errors import AdapterError, SourceError, SourceNotFound, SourceRefused
from adapters.sources import local
from adapters.sources.address import Policy, parse
from adapters.sources.fetch import fetch
from adapters.upload import UploadLimits
from tests.adapters.factories import AdapterFiles, tar

LIMITS = UploadLimits(max_bytes=1 << 20, max_files=50)
FILES = AdapterFiles().files()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "into").mkdir()
    return AdapterFiles(extra={"optimizer.pt": b"x", "notes.txt": b"x"}).write(tmp_path / "root" / "run").parent


def read(address: str, root: Path) -> dict[str, bytes]:
    into = root.parent / "into"
    fetch(parse(address), Policy(roots=(str(root),)), into, LIMITS)
    return {path.name: path.read_bytes() for path in into.iterdir()}


def test_a_directory_gives_its_kept_files(root: Path) -> None:
    assert read(f"file://{root}/run", root) == FILES


def test_an_archive_comes_as_it_is(root: Path) -> None:
    archive = tar(FILES)
    (root / "a b.tar.gz").write_bytes(archive)
    assert read(f"file://{root}/a%20b.tar.gz", root) == {"a b.tar.gz": archive}


def test_a_link_inside_is_followed(root: Path) -> None:
    (root / "latest").symlink_to(root / "run")
    (root / "run" / "README.md").symlink_to(root / "run" / "notes.txt")
    assert read(f"file://{root}/latest", root) == {**FILES, "README.md": b"x"}


def test_the_root_itself_may_be_a_link(root: Path) -> None:
    (root.parent / "named").symlink_to(root)
    assert read(f"file://{root}/run", root.parent / "named") == FILES


@pytest.mark.parametrize("path", ["outside/run", "outside/none", "root/escape/run", "rootless/run"])
def test_what_is_outside_is_refused_whether_it_is_there_or_not(root: Path, path: str) -> None:
    AdapterFiles().write(root.parent / "outside" / "run")
    AdapterFiles().write(root.parent / "rootless" / "run")
    (root / "escape").symlink_to(root.parent / "outside")
    with pytest.raises(SourceRefused, match="not inside a directory"):
        read(f"file://{root.parent}/{path}", root)


def test_a_file_that_links_outside_is_refused(root: Path) -> None:
    (root.parent / "secret").write_text("{}")
    (root / "run" / "adapter_config.json").unlink()
    (root / "run" / "adapter_config.json").symlink_to(root.parent / "secret")
    with pytest.raises(SourceRefused, match="a link leads out"):
        read(f"file://{root}/run", root)


def test_a_file_that_becomes_a_link_after_it_was_listed_is_refused(root: Path) -> None:
    with local.listing(parse(f"file://{root}/run"), Policy(roots=(str(root),))) as listing:
        pass
    (root.parent / "secret").write_text("{}")
    weights = root / "run" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(root.parent / "secret")
    opened = next(file.open for file in listing.files if file.name == weights.name)
    with pytest.raises(SourceRefused), opened():
        pass


def test_a_pipe_or_a_socket_is_refused_and_nobody_waits(root: Path) -> None:
    weights = root / "run" / "adapter_model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(SourceRefused, match="expected a plain file"):
        read(f"file://{root}/run", root)
    weights.unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(weights))
        with pytest.raises(AdapterError):
            read(f"file://{root}/run", root)


def test_what_is_not_there(root: Path) -> None:
    with pytest.raises(SourceNotFound):
        read(f"file://{root}/none", root)


def test_a_host_is_no_directory(root: Path) -> None:
    with pytest.raises(SourceError, match="names a host"):
        read("file://server/share", root)


def test_a_single_file_must_be_an_archive(root: Path) -> None:
    with pytest.raises(SourceError, match="no archive"):
        read(f"file://{root}/run/adapter_config.json", root)


def test_an_empty_directory_names_what_is_missing(root: Path) -> None:
    (root / "empty").mkdir()
    with pytest.raises(AdapterError, match="holds none of an adapter's files") as error:
        read(f"file://{root}/empty", root)
    assert error.value.code == "missing_file"
