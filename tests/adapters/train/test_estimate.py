"""The checklist's figures, to the digit where they are exact; and the activations against what autograd keeps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import ConfigError
from adapters.train.activations import Workload, activation_bytes, step_bytes
from adapters.train.architecture import Architecture, Ranks, architecture_of
from adapters.train.cli import main
from adapters.train.estimate import Terms, constant_bits, full, lora, on_a_cpu, qlora
from adapters.train.memory import parse_bytes
from adapters.train.quoted import LLAMA_7B, LLAMA_8B, LLAMA_65B, MISTRAL_7B, QV, quoted_figures

SMALL = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def gigabytes(terms: Terms, *names: str) -> list[float]:
    return [round(getattr(terms, name) / 1e9, 1) for name in names]


def test_a_square_matrix_of_4096_at_rank_8_takes_65536_parameters() -> None:
    square = Architecture(1, 4096, 4096, 32, 32, 128, 1, architecture_of(LLAMA_7B).targeted(["q_proj"]), 0, 0)
    assert square.adapter_parameters(Ranks(8)) // 32 == 65_536
    assert round(65_536 / 4096**2, 4) == 0.0039


def test_llama_8b_is_counted_to_the_parameter() -> None:
    assert architecture_of(LLAMA_8B).parameters == 8_030_261_248


def test_8b_in_16_bits_takes_16_and_16_and_32_gb() -> None:
    terms = full(architecture_of(LLAMA_8B), Workload(batch=1, tokens=512))
    assert gigabytes(terms, "weights", "gradients", "optimizer_states") == [16.1, 16.1, 32.1]


def test_the_bits_of_a_parameter_are_4_5_and_with_double_quantisation_4_127() -> None:
    assert 4 + constant_bits(double=False) == 4.5
    assert 4 + constant_bits(double=True) == pytest.approx(4.127, abs=5e-4)
    assert 4 + constant_bits(128, double=True) == pytest.approx(4.064, abs=1e-3)


def test_mistral_7b_at_rank_16_trains_7_million_on_q_and_v_and_42_million_on_all_seven() -> None:
    mistral = architecture_of(MISTRAL_7B)
    assert mistral.adapter_parameters(Ranks(16, QV)) == 6_815_744
    assert mistral.adapter_parameters(Ranks(16)) == 41_943_040
    assert mistral.adapter_parameters(Ranks(16)) / (mistral.parameters + 41_943_040) == pytest.approx(0.00576, abs=5e-6)


def test_llama_7b_at_rank_8_on_q_and_v_is_the_4_million_that_is_quoted_for_8b() -> None:
    assert architecture_of(LLAMA_7B).adapter_parameters(Ranks(8, QV)) == 4_194_304
    assert architecture_of(LLAMA_8B).adapter_parameters(Ranks(8, QV)) == 3_407_872


def test_qlora_brings_65b_to_one_card_of_48_gb_and_full_fine_tuning_takes_780() -> None:
    llama = architecture_of(LLAMA_65B)
    load = Workload(batch=1, tokens=512, checkpointing=True, optimizer="paged_adamw_8bit")
    terms = qlora(llama, load, Ranks(64))
    assert 30e9 < terms.weights + terms.quantisation_constants < 36e9
    assert terms.total < 48e9 < lora(llama, load, Ranks(64)).total
    assert 12 * llama.parameters == pytest.approx(783e9, rel=0.01)  # 2 + 2 + 8 bytes: Adam in fp32


def test_a_quoted_figure_says_what_is_right_and_which_ones_are_not() -> None:
    wrong = {each.claim.partition(":")[0]: each.found for each in quoted_figures() if not each.right}
    assert {"Adam for 8B", "LLaMA-8B", "QLoRA pages gradients out"} <= set(wrong)
    assert "41,943,040, 0.576%" in wrong["Mistral-7B, r=16 on seven module types"]


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        SMALL | {"model_type": "mistral", "tie_word_embeddings": False},
        SMALL | {"model_type": "qwen2"},
        SMALL | {"model_type": "qwen3", "head_dim": 32},
        SMALL | {"attention_bias": True, "mlp_bias": True},
    ],
)
def test_what_is_read_from_a_configuration_is_what_transformers_builds(config: dict[str, Any]) -> None:
    from adapters.train.architecture import built_on_meta

    assert architecture_of(config) == built_on_meta(config)


def test_an_architecture_that_is_not_read_here_is_built_on_the_meta_device() -> None:
    gpt2 = architecture_of({"model_type": "gpt2"})
    assert gpt2.parameters == 124_439_808
    assert gpt2.adapter_parameters(Ranks(8, ["c_attn"])) == 12 * 8 * (768 + 3 * 768)
    assert gpt2.adapter_parameters(Ranks(8, ["c_proj"])) == 12 * 8 * (768 + 768 + 768 + 4 * 768)


def small_model(dtype: Any, peft_config: Any) -> Any:
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from adapters.train.low_rank import use_low_rank_products

    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "use_cache": False})).to(dtype)
    if peft_config is not None:
        model = get_peft_model(model, peft_config).base_model.model
        use_low_rank_products(model)
    return model


def kept_by_autograd(dtype: Any, peft_config: Any) -> int:
    """Bytes of all tensors, but parameters, that the graph of one forward pass through the blocks holds."""
    import torch

    model = small_model(dtype, peft_config)
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.ones((4, 32), dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0  # without padding there would be no mask at all
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = model.train().model(input_ids=ids, attention_mask=mask)
        assert held.last_hidden_state.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("targets", "dropout"), [(None, 0.0), (QV, 0.0), (None, 0.1), ((), 0.0)], ids=["all", "qv", "dropout", "full"]
)
def test_the_activations_are_what_autograd_keeps(dtype: str, targets: tuple[str, ...] | None, dropout: float) -> None:
    import torch
    from peft import LoraConfig

    named = list(targets) if targets else "all-linear"
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=named, lora_dropout=dropout)
    size = {"bfloat16": 2, "float32": 4}[dtype]
    load = Workload(batch=4, tokens=32, compute_bytes=size, dropout=dropout > 0)
    estimate = activation_bytes(architecture_of(SMALL), load, None if targets == () else Ranks(8, targets))
    kept = kept_by_autograd(getattr(torch, dtype), None if targets == () else config)
    assert estimate == pytest.approx(kept, rel=0.06)


def test_the_activations_of_adalora_are_what_autograd_keeps() -> None:
    """peft's own products, whose fp32 copies weigh more than all else."""
    import torch
    from peft import AdaLoraConfig

    config = AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=8, target_r=4, total_step=20, tinit=2, tfinal=6, target_modules="all-linear"
    )
    load = Workload(batch=4, tokens=32, fp32_products=True)
    estimate = activation_bytes(architecture_of(SMALL), load, Ranks(8))
    assert estimate == pytest.approx(kept_by_autograd(torch.bfloat16, config), rel=0.06)


@pytest.mark.parametrize(
    "pattern",
    [{"q_proj": 16}, {"self_attn.v_proj": 4}, {"layers.1.mlp.up_proj": 32}, {"q_proj": 2, "layers.2.mlp.down_proj": 1}],
    ids=str,
)
def test_a_rank_pattern_is_counted_as_peft_takes_it(pattern: dict[str, int]) -> None:
    import torch
    from peft import LoraConfig

    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear", rank_pattern=pattern)
    model = small_model(torch.float32, config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert architecture_of(SMALL).adapter_parameters(Ranks(8, pattern=pattern)) == trained


def test_a_run_takes_about_what_was_estimated(write_yaml: Callable[..., Path], tmp_path: Path) -> None:
    """In a process of its own, as `train run` is; loadtests/RESULTS.md has bigger ones."""
    path = write_yaml(training={"max_steps": 2, "per_device_train_batch_size": 3})
    command = [sys.executable, "-m", "adapters.train", "run", str(path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "500"})
    (figures,) = re.findall(r"peak memory ([\d,]+) MB measured, ([\d,]+) MB estimated", told.stdout + told.stderr)
    measured_mb, estimated_mb = (int(figure.replace(",", "")) for figure in figures)
    assert 0.8 < estimated_mb / measured_mb < 1.25


def test_the_file_of_the_base_counts_at_the_peak_but_not_where_memory_is_short() -> None:
    """8 B parameters in 16 bits are 16 GB on disk; packed, and with little to train, they take a third of it."""
    packed = qlora(architecture_of(LLAMA_8B), Workload(batch=1, tokens=16), Ranks(8))
    terms = on_a_cpu(packed, 16 * 10**9, input_bytes=4 << 20)
    assert terms.holes == 0
    assert terms.loading + terms.needed == terms.total
    assert terms.total == packed.weights + packed.quantisation_constants + 16 * 10**9 + terms.libraries
    assert terms.needed == packed.total + terms.libraries < 8e9


def test_a_checkpointed_step_is_largest_in_its_loss_or_in_its_backward_pass() -> None:
    """Never both: a layer is computed again when the logits are gone."""
    small = architecture_of(SMALL | {"vocab_size": 4096})
    load = Workload(batch=1, tokens=64, checkpointing=True)
    few, many = (sum(step_bytes(small, replace(load, logit_rows=rows), Ranks(8))) for rows in (1, 64))
    inputs = 3 * 64 * 64 * 2
    outside = 64 * (4 + 3 * 2) * 64
    under_way = 64 * 2 * (3 * 192 + 4 * 64)
    assert many == inputs + outside + 12 * 4096 * 64
    assert few == activation_bytes(small, load, Ranks(8)) + outside + under_way < many


@pytest.mark.parametrize(
    ("text", "count"), [("24GB", 24 * 10**9), ("8 GiB", 8 * 2**30), ("512mb", 512 * 10**6), ("1000", 1000)]
)
def test_an_amount_of_memory_is_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["much", "24 parsecs", "", "1.2.3GB"])
def test_another_amount_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no amount of memory"):
        parse_bytes(text)


TAKEN_AND_GIVEN_BACK = """
from adapters.train.memory import measured

with measured() as before:
    pass
with measured() as usage:
    held = bytearray(b"x") * 200_000_000
    del held
print(usage.peak - before.peak)
"""


def test_what_a_block_takes_at_most_is_measured_also_when_it_gives_it_back() -> None:
    """In a process of its own: one that has run a thousand tests has memory to give back at any time."""
    told = subprocess.run([sys.executable, "-c", TAKEN_AND_GIVEN_BACK], capture_output=True, text=True, check=True)
    assert 190e6 < int(told.stdout) < 260e6


def test_estimate_loads_no_weights_and_names_every_term(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    assert main(["estimate", "--model", str(tmp_path / "config.json"), "--memory", "99GB"]) == 0
    told = capsys.readouterr().out
    for term in (*Terms.__dataclass_fields__, "sum"):
        assert term.replace("_", " ") in told
    assert "8,030,261,248 parameters, 20,971,520 trained" in told


def test_what_would_not_fit_exits_4_and_says_what_to_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_65B))
    command = ["estimate", "--model", str(tmp_path), "--memory", "24GB"]
    assert main(command) == 4
    assert "lower training.per_device_train_batch_size" in " ".join(capsys.readouterr().err.lower().split())
    assert main([*command, "--ignore-memory"]) == 0


def test_a_run_that_would_not_fit_exits_4_before_anything_is_made(write_yaml: Callable[..., Path]) -> None:
    path = write_yaml()
    assert main(["run", str(path), "--memory", "1MB"]) == 4
    assert not (path.parent / "out").exists()


@pytest.mark.parametrize("content", ["{}", "no JSON", '{"model_type": "llama"}', '{"model_type": "unheard-of"}'])
def test_a_file_that_is_no_configuration_of_a_model_exits_2(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert main(["estimate", "--model", str(tmp_path)]) == 2


def test_a_target_that_the_base_does_not_have_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    assert main(["estimate", "--model", str(tmp_path), "--set", "peft.target_modules=[c_attn]"]) == 2
    assert "this base has no c_attn; it has q_proj" in capsys.readouterr().err


def test_logits_are_counted_in_the_chunks_that_the_loss_takes() -> None:
    from adapters.train import forecast, head_loss

    assert forecast.LOGIT_CHUNK_BYTES == head_loss.CHUNK_BYTES


@pytest.mark.parametrize("double", [False, True])
def test_the_base_in_nf4_takes_what_bitsandbytes_holds_with_its_scales(tmp_path: Path, double: bool) -> None:
    """transformers' own get_memory_footprint leaves the scales out."""
    from adapters.train.sections import QuantizationSection
    from tests.adapters.train import tiny

    base = tiny.save_base(tmp_path / "base")
    model = tiny.base_of(base, QuantizationSection(bnb_4bit_use_double_quant=double))
    packed = [each for each in model.parameters() if hasattr(each, "quant_state")]
    scales = sum(_scale_bytes(each.quant_state) for each in packed)
    architecture = architecture_of(json.loads((base / "config.json").read_text()))
    terms = qlora(architecture, Workload(batch=1, tokens=8), Ranks(4), double=double)
    assert (len(packed), sum(each.nbytes for each in packed)) == (14, architecture.linear // 2)
    assert 0 <= scales - terms.quantisation_constants < 4 * len(packed)  # a block that is begun counts whole there


def _scale_bytes(state: Any) -> int:
    """Without the two tables that every weight shares."""
    nested = state.state2.absmax.nbytes if state.nested else 0
    return int(state.absmax.nbytes + nested)


def test_an_encoder_with_a_decoder_is_refused_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match="a 't5' is an encoder and a decoder; expected") as caught:
        architecture_of({"model_type": "t5", "is_encoder_decoder": True})
    assert len(caught.value.message) < 200
    with pytest.raises(ConfigError, match="cannot build a 'vit' from it") as caught:
        architecture_of({"model_type": "vit"})
    assert len(caught.value.message) < 300
