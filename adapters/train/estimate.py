"""What a training run will hold in memory, term by term, before anything is loaded: pure arithmetic on shapes.

Every formula names its source; what a step holds is in activations.py. How near the sum comes to what real runs take
stands in loadtests/RESULTS.md. 1 GB is 10⁹ bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from adapters.train.activations import Workload, step_bytes
from adapters.train.allocator import MAPPED_BYTES
from adapters.train.architecture import Architecture, Ranks

NF4_BLOCK = 64
STATE_BLOCK = 256
"""Of double quantisation, and of bitsandbytes' 8-bit optimizers."""
MASTER_BYTES = 4
IMPORTANCE_BYTES = 3 * MASTER_BYTES
"""Of a parameter in AdaLoRA's allocator: importance, its average and that of its uncertainty (Zhang et al. 2023)."""
OPTIMIZER_BYTES: Mapping[str, float] = {
    "adamw_8bit": 2 + 8 / STATE_BLOCK,
    "paged_adamw_8bit": 2 + 8 / STATE_BLOCK,
    "lion_8bit": 1 + 4 / STATE_BLOCK,
}
"""Bytes a trained parameter, of bitsandbytes' optimizers; what torch's AdamW takes goes by the parameters' type."""
LIBRARIES_BYTES = 610_000_000
"""Python, torch, transformers, peft, bitsandbytes and the tokenizer, with what they set up in a first forward pass.
Measured on the demo base: 595 to 645 MB with torch 2.13 for CPUs (x86-64, Linux)."""
HOLES = 0.2
"""Of the activations, where the input of a layer is too small to be mapped alone (allocator.py). Measured on the demo
base: 0.12 to 0.36."""


@dataclass(frozen=True)
class Terms:
    """Bytes. The names are the rows of the table."""

    weights: int
    quantisation_constants: int
    adapter: int
    gradients: int
    optimizer_states: int
    activations: int
    logits: int
    libraries: int = 0
    """Of the process; on a GPU they take nothing of its memory that torch would count."""
    holes: int = 0
    """In the heap of the process, between tensors too small to be mapped alone."""
    loading: int = 0
    """What is there while the base is loaded, beyond what training holds later: pages of its file, which the kernel
    takes back where it needs them."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def needed(self) -> int:
        return self.total - self.loading


def constant_bits(block: int = NF4_BLOCK, *, double: bool) -> float:
    """Bits a parameter for NF4's block scales. Dettmers et al. 2023, section 3: 32/64 = 0.5; with double quantisation
    8/64 + 32/(64·256) = 0.127. With the 4 bits of the code itself 4.500 and 4.127, both measured."""
    return 8 / block + 32 / (block * STATE_BLOCK) if double else 32 / block


def optimizer_bytes(optimizer: str, parameter_bytes: int) -> float:
    """Bytes of state a trained parameter. torch's AdamW keeps two moments in the type of the parameter itself: 4N
    bytes where all is 16-bit, 8N in fp32. 8-bit states have one byte a moment and a scale for every 256."""
    return OPTIMIZER_BYTES.get(optimizer) or 2.0 * parameter_bytes


def full(architecture: Architecture, load: Workload) -> Terms:
    """Everything trained in the compute type: 2N weights, 2N gradients, 4N Adam in 16 bits."""
    count, size = architecture.parameters, load.compute_bytes
    activations, logits = step_bytes(architecture, load, None)
    return Terms(
        weights=count * size,
        quantisation_constants=0,
        adapter=0,
        gradients=count * size,
        optimizer_states=round(count * optimizer_bytes(load.optimizer, size)),
        activations=activations,
        logits=logits,
    )


def lora(architecture: Architecture, load: Workload, ranks: Ranks) -> Terms:
    """The base frozen in the compute type, the adapter in fp32, which is also the type of its gradients and states."""
    trained = architecture.adapter_parameters(ranks)
    activations, logits = step_bytes(architecture, load, ranks)
    importance = IMPORTANCE_BYTES if load.importance else 0
    return Terms(
        weights=architecture.parameters * load.compute_bytes,
        quantisation_constants=0,
        adapter=trained * MASTER_BYTES,
        gradients=trained * MASTER_BYTES,
        optimizer_states=round(trained * (optimizer_bytes(load.optimizer, MASTER_BYTES) + importance)),
        activations=activations,
        logits=logits,
    )


def qlora(
    architecture: Architecture, load: Workload, ranks: Ranks, *, double: bool = True, block: int = NF4_BLOCK
) -> Terms:
    """The same on NF4: linear modules at 4 bits, embeddings, lm_head and norms in the compute type. While a layer
    computes, its largest weight exists a second time in the compute type."""
    plain = lora(architecture, load, ranks)
    kept = architecture.parameters - architecture.linear
    unpacked = max((each.rows * each.columns for each in architecture.linears), default=0) * load.compute_bytes
    return replace(
        plain,
        weights=architecture.linear // 2 + kept * load.compute_bytes,
        quantisation_constants=round(architecture.linear * constant_bits(block, double=double) / 8),
        activations=plain.activations + unpacked,
    )


def on_a_cpu(terms: Terms, file_bytes: int, input_bytes: int) -> Terms:
    """With what the process takes there. `file_bytes`: of the checkpoint, mapped until the base is made of it, or for
    good where its pages are the weights; `input_bytes`: of what a layer gets."""
    holes = round(HOLES * terms.activations) if input_bytes < MAPPED_BYTES else 0
    steps = terms.adapter + terms.gradients + terms.optimizer_states + terms.activations + terms.logits + holes
    loading = 0 if file_bytes == terms.weights else max(0, file_bytes - steps)
    return replace(terms, libraries=LIBRARIES_BYTES, holes=holes, loading=loading)
