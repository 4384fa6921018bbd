"""A merged engine in four bits: merged, packed and measured for real, on random weights; the engine is fake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.base import BaseModel
from loadtests.synthetic import write_adapter
from server.engine.memory_plan import plan_of, plan_of_merge
from server.engine.vllm_args import is_quantised
from tests.adapters.factories import loose
from tests.server.harness import Exchange, World, world

MERGED = "/v1/adapters/a/versions/1/merged"
JOB_S = 180.0


async def put(built: World, **wish: Any) -> tuple[int, Any]:
    exchange = Exchange(built.app, MERGED, wish, "PUT")
    await exchange.start()
    return exchange.status, json.loads(exchange.text)


@pytest.fixture
def adapter(small_base: Path, tmp_path: Path) -> Path:
    """Weak, as trained ones are: a few hundredths of the weights."""
    return write_adapter(tmp_path / "a", BaseModel.read(small_base), rank=4, seed=0, strength=0.002)


def publish(built: World, adapter: Path) -> None:
    built.services.ingest.upload("a", loose({path.name: path.read_bytes() for path in adapter.iterdir()}))


async def test_the_engine_gets_the_base_in_nf4_with_the_adapter_in_it(
    small_base: Path, adapter: Path, tmp_path: Path
) -> None:
    built = world(small_base, tmp_path / "data", memory_reserve_bytes=0, merge_probe_tokens=64)
    publish(built, adapter)
    async with built.running():
        _, job = await put(built, quantization="nf4")
        ended = await built.services.runner.ended(job["id"], JOB_S)
        assert ended.result is not None, ended.error
        assert ended.result["values"] == "original", "NF4 of what NF4 has left would lose the adapter"
        (engine,) = built.services.merged.snapshot().values()
        assert engine.directory.name.endswith("-served-nf4")
        assert is_quantised(engine.directory)
        planned = plan_of_merge(built.services.base, built.settings, quantised=True).terms["weights"]
        assert planned == pytest.approx(plan_of(engine.directory, built.settings).terms["weights"], rel=0.05)
        assert planned < plan_of_merge(built.services.base, built.settings).terms["weights"]
        assert sorted(path.name for path in (built.settings.data_dir / "merging").iterdir()) == []


async def test_in_fp32_there_is_none(small_base: Path, adapter: Path, tmp_path: Path) -> None:
    built = world(small_base, tmp_path / "data", quantization="none", dtype="float32")
    publish(built, adapter)
    async with built.running():
        status, body = await put(built, quantization="nf4")
        assert (status, body["error"]["param"]) == (400, "quantization")
        assert built.services.jobs.jobs() == []
