"""Which weights the engine loads: the base in NF4 where it can be kept so, else the base itself."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from adapters.base import BaseModel
from server.base import find_base, weights_of
from server.settings import Settings
from tests.adapters.factories import base_tensors, tensor, write_base

pytest.importorskip("bitsandbytes")


def configured(base: Path, tmp_path: Path, **changes: Any) -> tuple[Settings, BaseModel]:
    settings = Settings(**{"model": str(base), "data_dir": tmp_path / "data", **changes})
    return settings, find_base(settings)


def test_the_base_in_nf4_is_made_and_found_again(tiny_base: Path, tmp_path: Path) -> None:
    settings, base = configured(tiny_base, tmp_path)

    first = weights_of(settings, base)
    before = (first / "model.safetensors").stat()

    assert weights_of(settings, base) == first
    assert (first / "model.safetensors").stat() == before
    assert first.parent == tmp_path / "data" / "quantized"
    assert (first / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization": "none"},
        {"cache_quantized": False},
        {"engine_args": ("--tensor-parallel-size=2",)},
        {"engine_args": ("-tp", "2")},
    ],
)
def test_the_base_itself_where_that_is_wanted_or_needed(
    tiny_base: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings, base = configured(tiny_base, tmp_path, **changes)

    assert weights_of(settings, base) == tiny_base
    assert not (tmp_path / "data" / "quantized").exists()


def test_a_base_with_fused_experts_is_left_to_the_engine(tmp_path: Path) -> None:
    experts = base_tensors() | {"experts": tensor([[[1.0, 2.0]], [[3.0, 4.0]]], "F32")}
    settings, base = configured(write_base(tmp_path / "experts", experts), tmp_path)

    assert weights_of(settings, base) == tmp_path / "experts"


def test_a_disk_that_cannot_be_written_costs_time_and_not_the_start(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings, base = configured(tiny_base, tmp_path)
    (tmp_path / "data" / "quantized").write_text("a file in its place")

    with caplog.at_level(logging.WARNING):
        assert weights_of(settings, base) == tiny_base

    assert "cannot be kept" in caplog.text
    assert "File exists" in str(caplog.records[-1].__dict__["reason"])
