from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from adapters import download as module
from adapters.download import download
from adapters.errors import RemoteUnreachable, StoreError, UploadError

CONTENT = bytes(range(200))
FACTS: dict[str, Any] = {
    "name": "a.bin",
    "size_bytes": len(CONTENT),
    "sha256": hashlib.sha256(CONTENT).hexdigest(),
}
Reading = Callable[[str, int], AbstractContextManager[Iterator[bytes]]]


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.0)


@pytest.fixture
def asked() -> list[int]:
    """The offsets that were asked for."""
    return []


def sending(asked: list[int], *, at_once: int = len(CONTENT), content: bytes = CONTENT) -> Reading:
    """Breaks off after so many bytes of an answer."""

    @contextmanager
    def read(name: str, offset: int) -> Iterator[Iterator[bytes]]:
        asked.append(offset)

        def pieces() -> Iterator[bytes]:
            yield content[offset : offset + at_once]
            if offset + at_once < len(content):
                raise RemoteUnreachable("it broke off")

        yield pieces()

    return read


def test_what_breaks_off_goes_on_where_it_was(tmp_path: Path, asked: list[int]) -> None:
    counted: list[int] = []
    download([FACTS], sending(asked, at_once=30), tmp_path / "out", lambda name, count: counted.append(count))
    assert (tmp_path / "out/a.bin").read_bytes() == CONTENT
    assert asked == [0, 30, 60, 90, 120, 150, 180]
    assert sum(counted) == len(CONTENT)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.bin"]


def test_a_later_call_goes_on_and_what_is_whole_is_not_asked_for_again(tmp_path: Path, asked: list[int]) -> None:
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:50])
    download([FACTS], sending(asked), tmp_path)
    assert (asked, (tmp_path / "a.bin").read_bytes()) == ([50], CONTENT)
    download([FACTS], sending(asked), tmp_path)
    assert asked == [50]


def test_other_bytes_are_thrown_away(tmp_path: Path, asked: list[int]) -> None:
    with pytest.raises(StoreError, match="it was thrown away"):
        download([FACTS], sending(asked, content=bytes(len(CONTENT))), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_sends_nothing_more_is_given_up_and_what_came_stays(tmp_path: Path, asked: list[int]) -> None:
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:50])
    with pytest.raises(RemoteUnreachable):
        download([FACTS], sending(asked, at_once=0), tmp_path)
    assert asked == [50] * module.TRIES
    assert (tmp_path / "a.bin.part").read_bytes() == CONTENT[:50]


def test_a_path_is_no_file_name(tmp_path: Path, asked: list[int]) -> None:
    with pytest.raises(UploadError):
        download([{**FACTS, "name": "../a.bin"}], sending(asked), tmp_path / "out")
    assert asked == []
