"""The demo base was made out of a GGUF file: written as one again, it is that file, key by key and tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFReader

from adapters.base import BaseModel
from adapters.demo_base import find_gguf
from adapters.merge.export.gguf_model import plan_gguf, write_model
from adapters.merge.export.origin import Origin

OURS = {
    # what newer converters write, too, and what this file leaves to llama.cpp's defaults
    "llama.attention.key_length": 64,
    "llama.attention.value_length": 64,
    "tokenizer.ggml.add_eos_token": False,
}
THEIRS = {"general.organization", "general.finetune", "general.basename", "general.languages", "general.license"}
"""Facts that the Hugging Face directory does not hold; a licence can be given."""
DIFFERENT = {
    "GGUF.kv_count",
    "general.name",
    "general.file_type",  # 4 bits there, f16 here
}


@pytest.fixture(scope="module")
def both(demo_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[GGUFReader, GGUFReader]:
    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    write_model(plan_gguf(BaseModel.read(demo_base), "f16", Origin("SmolLM2")), path)
    return GGUFReader(path), GGUFReader(find_gguf())


def test_the_metadata_is_the_same_key_by_key(both: tuple[GGUFReader, GGUFReader]) -> None:
    ours, theirs = ({key: field.contents() for key, field in file.fields.items()} for file in both)
    assert {key: ours.pop(key) for key in OURS} == OURS
    for key in THEIRS:
        theirs.pop(key)
    assert ours.keys() == theirs.keys()
    assert {key for key in ours if ours[key] != theirs[key]} == DIFFERENT
    types = ({key: file.fields[key].types for key in ours} for file in both)
    first, second = types
    assert first == second


def test_the_tensors_have_the_same_names_and_shapes(both: tuple[GGUFReader, GGUFReader]) -> None:
    ours, theirs = ({tensor.name: list(tensor.shape) for tensor in file.tensors} for file in both)
    assert ours == theirs
    assert len(ours) == 272
