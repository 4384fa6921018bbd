"""Each format from an adapter and from a merged directory: whole, loaded again, measured; or nothing is left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters.base import BaseModel
from adapters.errors import Conflict, NotExportable, NotTheSame
from adapters.merge.apply import write_merged
from adapters.merge.export import exporting, gguf_model, llama_cpp
from adapters.merge.export.cli import main
from adapters.merge.export.exporting import Wish, export
from adapters.merge.plan import plan_merge
from tests.adapters.merge.export.tiny import save_adapter, save_model, save_sentencepiece, save_tokenizer

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: uv pip install xllamacpp")
pytestmark = pytest.mark.filterwarnings("ignore")
"""transformers, PEFT and bitsandbytes warn of what this machine has not."""
FEW = 24
"""Tokens to compare."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_tokenizer(save_model(tmp_path_factory.mktemp("base") / "tiny", intermediate_size=128))
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    return path


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter") / "random", r=4, lora_alpha=8)


@pytest.fixture(scope="module")
def merged(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("merged") / "out"
    write_merged(plan_merge(adapter, BaseModel.read(base), "original"), path)
    return path


def wish(source: Path, out: Path, format_: Any, **fields: Any) -> Wish:
    return Wish(source, out, format_, **{"tokens": FEW, **fields})


def sums(directory: Path) -> Mapping[str, str]:
    lines = (directory / "SHA256SUMS").read_text().splitlines()
    return {name: hexed for hexed, name in (line.split("  ") for line in lines)}


def check_whole(out: Path, record: Mapping[str, Any]) -> None:
    assert json.loads((out / "loraplex-export.json").read_text()) == record
    there = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}
    there.pop("SHA256SUMS")
    assert sums(out) == there
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert {oct(path.stat().st_mode)[-3:] for path in out.iterdir()} == {"644"}


def test_an_adapter_as_gguf(adapter: Path, base: Path, tmp_path: Path) -> None:
    told: list[str] = []
    asked = wish(adapter, tmp_path / "out", "gguf", outtype="q8_0", base=base, values="original", ollama=True, max_kl=1)
    record = export(asked, lambda what, done, of: told.append(what))
    check_whole(tmp_path / "out", record)
    assert {*record["files"], "Modelfile", "README.md"} < {path.name for path in (tmp_path / "out").iterdir()}
    assert list(record["files"]) == ["tiny-random-q8_0.gguf"]
    assert (record["check"]["by"], record["check"]["tokens"]) == (llama_cpp.version(), FEW)
    assert 1e-6 < record["check"]["kl"] < 1e-2
    assert 0.98 < record["adapter_kept"] < 1.01
    assert record["license"] == "apache-2.0"
    assert record["lineage"]["adapter"] == "random"
    assert list(dict.fromkeys(told)) == [
        "merging in fp32",
        "what q8_0 keeps of the adapter",
        "writing GGUF",
        "what the source says",
        "what the export says",
    ]


def test_a_merged_directory_as_gguf_of_32_bits_computes_the_same(merged: Path, tmp_path: Path) -> None:
    record = export(wish(merged, tmp_path / "out", "gguf", outtype="f32", name="another name"))
    check = record["check"]
    assert (list(record["files"]), record["name"]) == (["another-name-f32.gguf"], "another name")
    assert check["kl"] < 1e-5
    assert (check["texts_cut_otherwise"], check["chats_rendered_otherwise"]) == ([], 0)
    assert (check["same_answers"], check["same_first"]) == (1.0, 1.0)
    assert record["adapter_kept"] is None
    assert record["lineage"]["values"] == "original"


def test_without_llama_cpp_transformers_reads_the_file(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "is_there", lambda: False)
    record = export(wish(merged, tmp_path / "out", "gguf", outtype="f32"))
    assert "its reader of GGUF: weights only" in record["check"]["by"]
    assert record["check"]["kl"] < 1e-5


def test_the_adapter_alone(adapter: Path, base: Path, tmp_path: Path) -> None:
    record = export(wish(adapter, tmp_path / "out", "gguf-lora", base=base))
    check_whole(tmp_path / "out", record)
    assert list(record["files"]) == ["random-lora-f32.gguf"]
    assert "on the base as f16" in record["check"]["by"]
    assert record["check"]["kl"] < 1e-3
    assert "base_model_relation: adapter" in (tmp_path / "out/README.md").read_text()


def test_hugging_face_in_16_bits(adapter: Path, base: Path, tmp_path: Path) -> None:
    asked = wish(adapter, tmp_path / "out", "hf", base=base, values="original", max_kl=1)
    record = export(asked)
    out = tmp_path / "out"
    check_whole(out, record)
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} < {path.name for path in out.iterdir()}
    assert "loraplex-merge.json" not in {path.name for path in out.iterdir()}
    assert 1e-9 < record["check"]["kl"] < 0.01
    again = export(wish(out, tmp_path / "again", "hf", outtype="f16"))
    assert again["lineage"] == record["lineage"]
    assert {tensor.dtype for tensor in load_file(tmp_path / "again/model.safetensors").values()} == {torch.float16}


def test_nf4_says_what_is_left_of_the_adapter(adapter: Path, base: Path, tmp_path: Path) -> None:
    record = export(wish(adapter, tmp_path / "out", "nf4", base=base, values="original"))
    check_whole(tmp_path / "out", record)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["quantization_config"]["bnb_4bit_quant_type"], config["dtype"]) == ("nf4", "bfloat16")
    assert "bitsandbytes" in record["check"]["by"]
    assert record["check"]["kl"] > 1e-3
    assert 0 < record["adapter_kept"] < 1.2
    assert f"{record['adapter_kept']:.1%} is left in nf4" in (tmp_path / "out/README.md").read_text()


def test_what_four_bits_leave_nothing_of_is_refused_or_accepted(base: Path, tmp_path: Path) -> None:
    """A small change of values that lie on the levels of NF4 already."""
    adapter = save_adapter(base, tmp_path / "weak", r=4, lora_alpha=8, strength=0.06)
    asked = wish(adapter, tmp_path / "here/out", "nf4", base=base, values="dequantized")
    with pytest.raises(NotTheSame, match=r"is left in nf4, at least 50%; .*--from original.*accept_loss"):
        export(asked)
    assert list((tmp_path / "here").iterdir()) == []
    record = export(replace(asked, accept_loss=True))
    assert record["adapter_kept"] < 0.5
    assert "is left in nf4, at least 50%" in record["accepted"]["loss"]


def test_what_differs_by_more_is_refused_and_leaves_nothing_or_is_accepted_and_says_so(
    merged: Path, tmp_path: Path
) -> None:
    asked = wish(merged, tmp_path / "out", "gguf", outtype="q8_0", max_kl=1e-9)
    with pytest.raises(NotTheSame, match=r"nats per token \(KL\) from its source, allowed are 1e-09"):
        export(asked)
    assert list(tmp_path.iterdir()) == []
    record = export(replace(asked, accept_loss=True))
    assert "allowed are 1e-09" in record["accepted"]["loss"]
    assert "**Accepted by whoever made it:**" in (tmp_path / "out/README.md").read_text()


def test_a_tokenizer_that_cuts_otherwise_is_seen(merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = gguf_model.plan_gguf

    def wrong(*arguments: Any) -> Any:
        found = plan(*arguments)
        return replace(found, vocabulary=replace(found.vocabulary, pre="llama-bpe"))

    monkeypatch.setattr(exporting, "plan_gguf", wrong)
    with pytest.raises(NotTheSame, match="into other tokens than the source's tokenizer") as refused:
        export(wish(merged, tmp_path / "out", "gguf"))
    assert refused.value.code == "other_tokens"
    far = wish(merged, tmp_path / "out", "gguf", max_kl=1e-12)
    with pytest.raises(NotTheSame, match=r"into other tokens .* \(accept_differences\)"):
        export(replace(far, accept_loss=True))
    with pytest.raises(NotTheSame, match=r"allowed are 1e-12; .* \(accept_loss\)"):
        export(replace(far, accept_differences=True))
    record = export(replace(far, accept_loss=True, accept_differences=True))
    assert "allowed are 1e-12" in record["accepted"]["loss"]
    assert "into other tokens" in record["accepted"]["differences"]
    card = (tmp_path / "out/README.md").read_text()
    assert card.count("**Accepted by whoever made it:**") == 2


def test_a_chat_that_is_cut_otherwise_between_its_special_tokens_is_seen(tmp_path: Path) -> None:
    """llama.cpp puts a space behind every special token where it puts one in front of a text."""
    model = save_sentencepiece(save_model(tmp_path / "model"), first=True)
    with pytest.raises(NotTheSame, match=r"into other tokens than the source's tokenizer, such as '<\|im_start\|>user"):
        export(wish(model, tmp_path / "out", "gguf"))


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"format_": "gguf", "outtype": "q4_k"}, "bad_outtype"),
        ({"format_": "gguf-lora"}, "no_source"),
        ({"format_": "hf", "ollama": True}, "unknown_template"),
    ],
)
def test_wishes_that_cannot_be(merged: Path, tmp_path: Path, fields: dict[str, Any], code: str) -> None:
    with pytest.raises(NotExportable) as refused:
        export(wish(merged, tmp_path / "out", **fields))
    assert refused.value.code == code
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(merged: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(Conflict, match="name a directory that is not"):
        export(wish(merged, tmp_path, "hf"))
    assert (tmp_path / "mine").read_text() == "precious"


def test_exit_codes_and_what_is_printed(
    merged: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [str(merged), "--out", str(out), "--tokens", "8", "--format"]
    assert main([*words, "gguf", "--outtype", "q8_0", "--max-kl", "1e-9"]) == 7
    assert main([*words, "gguf", "--outtype", "q3"]) == 4
    assert main([str(adapter), "--out", str(out), "--format", "hf"]) == 4
    assert "give the base that it was trained on with --base" in capsys.readouterr().err
    assert main([str(tmp_path), "--out", str(out), "--format", "hf"]) == 4
    assert main([*words, "hf", "--outtype", "f32"]) == 0
    printed = capsys.readouterr().out
    assert f"{out / 'model.safetensors'}" in printed
    assert "KL 0.00000 nats a token" in printed
    assert main([*words, "hf"]) == 6
