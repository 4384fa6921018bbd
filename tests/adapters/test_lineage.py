"""Lineage that the uploader gives: checked, added to what the files say, never against them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from adapters.errors import InvalidAdapter
from adapters.lineage import merged, parents, require_lineage
from adapters.upload import UploadOptions
from tests.adapters.conftest import Shop
from tests.adapters.factories import AdapterFiles, lora_tensors

DIGEST = "sha256:" + "7" * 64
OTHER = AdapterFiles(tensors=lora_tensors(seed=1))


@pytest.mark.parametrize(
    "lineage",
    [
        {},
        {"parents": ["a@1", DIGEST], "data_digest": DIGEST, "run": "r7", "seed": 7, "code_version": "abc", "x": [None]},
        {"parents": []},
    ],
)
def test_lineage_that_can_be(lineage: dict[str, Any]) -> None:
    require_lineage(lineage)


@pytest.mark.parametrize(
    "lineage",
    [
        {"parents": "a@1"},
        {"parents": 7},
        {"parents": {"a@1": 1}},
        {"parents": ["a"]},
        {"parents": ["a@latest"]},
        {"parents": ["../a@1"]},
        {"parents": ["sha256:123"]},
        {"parents": [1]},
        {"parents": ["a@1"] * 65},
        {"seed": "7"},
        {"seed": True},
        {"run": 7},
        {"data_digest": None},
        {"x": "y" * 20_000},
        {"x": float("nan")},
        {"x": "\ud800"},
    ],
)
def test_lineage_that_cannot_be(lineage: dict[str, Any]) -> None:
    with pytest.raises(InvalidAdapter) as error:
        require_lineage(lineage)
    assert error.value.code == "bad_lineage"


@pytest.mark.parametrize("recorded", [None, 7, "a@1", {"a@1": 1}, [{"deep": 1}, "nonsense"]])
def test_a_file_may_record_anything_as_parents(recorded: Any) -> None:
    assert parents({"parents": recorded}) == []


def test_what_is_added_stands_beside_what_is_recorded() -> None:
    assert merged({"seed": 7}, {"run": "r", "seed": 7}) == {"seed": 7, "run": "r"}
    with pytest.raises(InvalidAdapter, match="seed is 8, recorded is 7"):
        merged({"seed": 7}, {"seed": 8})


def test_an_upload_adds_lineage_and_keeps_its_digest(shop: Shop) -> None:
    parent, _ = shop.ingest.upload("a", AdapterFiles().uploads())
    lineage = {"parents": ["a@1", parent.digest, DIGEST], "run": "r7"}
    child, _ = shop.ingest.upload("b", OTHER.uploads(), UploadOptions(lineage=lineage))
    assert child.manifest.lineage == lineage
    assert shop.registry.about(child).parents == {"a@1": "a@1", parent.digest: "a@1", DIGEST: None}
    again, created = shop.ingest.upload("b", OTHER.uploads(), UploadOptions(lineage={"seed": 7}))
    assert (again.digest, created, again.manifest.lineage) == (child.digest, False, lineage | {"seed": 7})
    with pytest.raises(InvalidAdapter, match="seed is 8, recorded is 7"):
        shop.ingest.upload("b", OTHER.uploads(), UploadOptions(lineage={"seed": 8}))
    assert shop.registry.resolve("b").manifest.lineage == lineage | {"seed": 7}


def test_what_loraplex_json_records_stands(shop: Shop) -> None:
    recorded = json.dumps({"lineage": {"seed": 7}}).encode()
    files = AdapterFiles(extra={"loraplex.json": recorded})
    with pytest.raises(InvalidAdapter, match="seed is 8, recorded is 7"):
        shop.ingest.upload("a", files.uploads(), UploadOptions(lineage={"seed": 8}))
    assert shop.registry.adapters() == []
    version, _ = shop.ingest.upload("a", files.uploads(), UploadOptions(lineage={"run": "r7"}))
    assert version.manifest.lineage == {"seed": 7, "run": "r7"}


def test_a_parent_here_must_be_there(shop: Shop) -> None:
    with pytest.raises(InvalidAdapter, match="the parent a@1 is no version of this registry"):
        shop.ingest.upload("b", OTHER.uploads(), UploadOptions(lineage={"parents": ["a@1"]}))
    assert shop.registry.adapters() == []
