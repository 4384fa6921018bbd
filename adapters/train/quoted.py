"""Figures that articles on LoRA and QLoRA quote, beside what the arithmetic gives, and where the quote is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from adapters.train.activations import Workload
from adapters.train.architecture import Architecture, Ranks, architecture_of
from adapters.train.estimate import constant_bits, full, qlora

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
MISTRAL_7B = LLAMA_8B | {"model_type": "mistral", "vocab_size": 32000}
LLAMA_7B = LLAMA_8B | {"vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": 32}
LLAMA_65B = LLAMA_7B | {
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
}
QV = ("q_proj", "v_proj")
ONE_ROW = Workload(batch=1, tokens=512, checkpointing=True, optimizer="paged_adamw_8bit")


@dataclass(frozen=True)
class Quoted:
    claim: str
    found: str
    right: bool


def quoted_figures() -> Iterator[Quoted]:
    eight, mistral = architecture_of(LLAMA_8B), architecture_of(MISTRAL_7B)
    yield Quoted("r=8 on 4096 × 4096: 65,536 parameters, 0.4 %", f"{8 * (4096 + 4096):,}, {8 / 2048:.2%}", True)
    yield Quoted("8B in 16 bits: 16 + 16 + 32 GB", _three(eight), True)
    yield Quoted(
        "Adam for 8B: 48 GB",
        "32 GB where both moments are 16-bit, 64 GB in fp32, 96 GB with an fp32 master copy; "
        "48 GB is 6 bytes a parameter, none of these",
        False,
    )
    yield Quoted(
        "LLaMA-8B: LoRA trains 4M parameters",
        f"{architecture_of(LLAMA_7B).adapter_parameters(Ranks(8, QV)):,} are LLaMA-7B's at r=8 on q and v; "
        f"Llama-3-8B has {eight.adapter_parameters(Ranks(8, QV)):,} there, "
        f"{eight.adapter_parameters(Ranks(8)):,} on all seven",
        False,
    )
    yield Quoted(
        "Mistral-7B, r=16 on seven module types: 6,815,744, 0.0941 %",
        f"that is q and v only; all seven are {mistral.adapter_parameters(Ranks(16)):,}, {_share(mistral, 16):.3%}",
        False,
    )
    yield Quoted(
        "QLoRA: 4.5 bits a parameter, 4.127 with double quantisation",
        f"{4 + constant_bits(double=False):.3f} and {4 + constant_bits(double=True):.3f}, of the linear modules; "
        "embeddings, lm_head and norms stay at 16",
        True,
    )
    yield Quoted(
        "65B: QLoRA on one card of 48 GB", _gb(qlora(architecture_of(LLAMA_65B), ONE_ROW, Ranks(64)).total), True
    )
    yield Quoted(
        "65B: full fine-tuning takes 780 GB",
        f"{_gb(12 * architecture_of(LLAMA_65B).parameters)} at 2 + 2 + 8 bytes a parameter, Adam in fp32",
        True,
    )
    yield Quoted("QLoRA pages gradients out", "only the optimizer's states are paged, and only on CUDA", False)
    yield Quoted(
        "QLoRA always saves memory",
        "not of a small base on a CPU: of SmolLM2-135M the embeddings stay, and logits and activations weigh more "
        "than all its weights (measured: bf16 2.1 GB, NF4 2.7 GB)",
        False,
    )


def _three(architecture: Architecture) -> str:
    terms = full(architecture, Workload(batch=1, tokens=1))
    return (
        " + ".join(f"{value / 1e9:.1f}" for value in (terms.weights, terms.gradients, terms.optimizer_states)) + " GB"
    )


def _share(architecture: Architecture, r: int) -> float:
    trained = architecture.adapter_parameters(Ranks(r))
    return trained / (architecture.parameters + trained)


def _gb(count: float) -> str:
    return f"{count / 1e9:.0f} GB"
