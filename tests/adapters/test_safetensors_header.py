"""What our header reader accepts, the safetensors library accepts as well, with the same shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from adapters.safetensors_header import BadHeader, TensorSpan, read_header
from tests.adapters.factories import safetensors, tensor, with_header

GOOD = safetensors({"a": tensor([[1.0, 2.0]]), "b": tensor([3.0], "BF16")})


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_spans_point_at_the_bytes(tmp_path: Path) -> None:
    file = write(tmp_path / "f", GOOD)
    spans = read_header(file)
    start = len(GOOD) - 10
    assert spans == {"a": TensorSpan("F32", (1, 2), start, 8), "b": TensorSpan("BF16", (1,), start + 8, 2)}
    assert GOOD[start:] == bytes.fromhex("0000803f 00000040 4040")


@pytest.mark.parametrize(
    ("header", "data_bytes", "reason"),
    [
        (b"[]", 0, "not a JSON object"),
        (b" {}", 0, "not a JSON object"),
        (b"{", 0, "not valid JSON"),
        (b'{"a":' * 5000, 0, "not valid JSON"),
        (b'{"a":NaN}', 0, "is not JSON"),
        (b'{"a":1,"a":1}', 0, "twice"),
        (b"\xff", 0, "not valid JSON"),
        ({"__metadata__": {"format": 1}}, 0, "__metadata__"),
        ({"a": 1}, 0, "exactly"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "exactly"),
        ({"a": entry(dtype="F31")}, 4, "unknown dtype"),
        ({"a": entry(dtype=[])}, 4, "unknown dtype"),
        ({"a": entry(shape=[-1])}, 4, "whole numbers"),
        ({"a": entry(shape=[True])}, 4, "whole numbers"),
        ({"a": entry(shape=[1.0])}, 4, "whole numbers"),
        ({"a": entry(shape=[2**62, 2**62])}, 4, "takes"),
        ({"a": entry(shape=[2])}, 4, "takes"),
        ({"a": entry(offsets=[4, 0])}, 4, "takes"),
        ({"a": entry(offsets=[0])}, 4, "whole numbers"),
        ({"a": entry()}, 3, "truncated"),
        ({"a": entry()}, 5, "padded"),
        ({"a": entry(shape=[1] * 9)}, 4, "at most 8"),
        ({"a": entry(shape=[2**62] * 8)}, 4, "takes"),
        ({"a": entry(shape=[2**62, 2**62, 0], offsets=[0, 0])}, 0, "takes"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', 4, "-0"),
        (b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4, "surrogates"),
        ({"a": entry(offsets=[4, 8])}, 8, "a gap"),
        ({"a": entry(), "b": entry()}, 4, "an overlap"),
        ({"a": entry(offsets=[0, 4]), "b": entry(offsets=[2, 6])}, 6, "an overlap"),
    ],
)
def test_bad_header_is_refused(tmp_path: Path, header: Any, data_bytes: int, reason: str) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    with pytest.raises(BadHeader, match=reason):
        read_header(write(tmp_path / "f", with_header(raw, bytes(data_bytes))))


@pytest.mark.parametrize("cut", range(0, len(GOOD) - 1, 7))
def test_every_truncation_is_refused(tmp_path: Path, cut: int) -> None:
    with pytest.raises(BadHeader):
        read_header(write(tmp_path / "f", GOOD[:cut]))


def test_a_refusal_is_short(tmp_path: Path) -> None:
    for header in ({"x" * 100_000: 1}, {"a": entry(dtype="x" * 100_000)}, {"a": entry(shape=[1] * 100_000)}):
        with pytest.raises(BadHeader) as error:
            read_header(write(tmp_path / "f", with_header(json.dumps(header).encode(), b"")))
        assert len(str(error.value)) < 500


def test_header_length_is_bounded_before_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(BadHeader, match="at most 10"):
        read_header(write(tmp_path / "f", GOOD), max_header_bytes=10)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_what_passes_here_the_library_opens(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(GOOD)
    for position, value in changes:
        content[position] = value
    file = write(tmp_path / "f", bytes(content))
    try:
        spans = read_header(file)
    except BadHeader:
        return
    with safe_open(file, framework="numpy") as opened:
        assert set(opened.keys()) == set(spans)
        for name, span in spans.items():
            assert tuple(opened.get_slice(name).get_shape()) == span.shape
