"""What a training run will hold in memory, term by term, before anything is loaded: pure arithmetic on shapes.

Every formula names its source; `activation_bytes` is compared by a test with what autograd really keeps. Not counted:
the libraries themselves (about 0.5 GB of a process on a CPU), the allocator's fragmentation, files still in the page
cache. 1 GB is 10⁹ bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields

from adapters.train.architecture import Architecture

NF4_BLOCK = 64
STATE_BLOCK = 256
"""Of double quantisation, and of bitsandbytes' 8-bit optimizers."""
MASTER_BYTES = 4
OPTIMIZER_BYTES: Mapping[str, float] = {
    "adamw_8bit": 2 + 8 / STATE_BLOCK,
    "paged_adamw_8bit": 2 + 8 / STATE_BLOCK,
    "lion_8bit": 1 + 4 / STATE_BLOCK,
}
"""Bytes a trained parameter, of bitsandbytes' optimizers; what torch's AdamW takes goes by the parameters' type."""


@dataclass(frozen=True)
class Workload:
    """One step's largest micro-batch, and what is done to make it small."""

    batch: int
    tokens: int
    """Of its longest row: all are padded to it."""
    checkpointing: bool = False
    dropout: bool = False
    compute_bytes: int = 2
    """2 for bfloat16, 4 for float32."""
    optimizer: str = "adamw_torch"
    logit_rows: int | None = None
    """Most positions whose logits are held at one time; None: every position of the micro-batch."""


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

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


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
    return Terms(
        weights=count * size,
        quantisation_constants=0,
        adapter=0,
        gradients=count * size,
        optimizer_states=round(count * optimizer_bytes(load.optimizer, size)),
        activations=activation_bytes(architecture, load, 0, ()),
        logits=logit_bytes(architecture, load),
    )


def lora(architecture: Architecture, load: Workload, r: int, targets: Collection[str] | None = None) -> Terms:
    """The base frozen in the compute type, the adapter in fp32, which is also the type of its gradients and states."""
    trained = architecture.adapter_parameters(r, targets)
    return Terms(
        weights=architecture.parameters * load.compute_bytes,
        quantisation_constants=0,
        adapter=trained * MASTER_BYTES,
        gradients=trained * MASTER_BYTES,
        optimizer_states=round(trained * optimizer_bytes(load.optimizer, MASTER_BYTES)),
        activations=activation_bytes(architecture, load, r, targets),
        logits=logit_bytes(architecture, load),
    )


def qlora(
    architecture: Architecture,
    load: Workload,
    r: int,
    targets: Collection[str] | None = None,
    *,
    double: bool = True,
    block: int = NF4_BLOCK,
) -> Terms:
    """The same on NF4: linear modules at 4 bits, embeddings, lm_head and norms in the compute type. While a layer
    computes, its largest weight exists a second time in the compute type."""
    plain = lora(architecture, load, r, targets)
    kept = architecture.parameters - architecture.linear
    unpacked = max((each.rows * each.columns for each in architecture.linears), default=0) * load.compute_bytes
    return Terms(
        weights=architecture.linear // 2 + kept * load.compute_bytes,
        quantisation_constants=round(architecture.linear * constant_bits(block, double=double) / 8),
        adapter=plain.adapter,
        gradients=plain.gradients,
        optimizer_states=plain.optimizer_states,
        activations=plain.activations + unpacked,
        logits=plain.logits,
    )


def activation_bytes(architecture: Architecture, load: Workload, r: int, targets: Collection[str] | None) -> int:
    """What autograd keeps of the blocks for the backward pass; `r` 0: of full fine-tuning.

    With checkpointing (Chen et al. 2016) the input of every layer, and all of one. `_layer_bytes` counts in the manner
    of Korthikanti et al. 2022, section 4.1, what transformers and peft keep today.
    """
    tokens = load.batch * load.tokens
    layer = _layer_bytes(architecture, load, r, targets) * tokens
    if load.checkpointing:
        return architecture.layers * architecture.hidden * load.compute_bytes * tokens + layer
    return architecture.layers * layer


def _layer_bytes(architecture: Architecture, load: Workload, r: int, targets: Collection[str] | None) -> int:
    """Of one token in one layer: two norms that compute in fp32, queries, keys and values repeated to all heads, the
    attention's output and its mask, gate, activation and up of a gated MLP; and the inputs of what is trained."""
    hidden, inner, size = architecture.hidden, architecture.intermediate, load.compute_bytes
    attention = architecture.heads * architecture.head_width
    kept = 4 * (2 * hidden + architecture.heads + 2) + size * (4 * attention + 3 * inner + load.tokens)
    if not r:
        return kept + size * (4 * hidden + inner)
    return kept + _adapter_bytes(architecture, load, r, targets)


def _adapter_bytes(architecture: Architecture, load: Workload, r: int, targets: Collection[str] | None) -> int:
    """What low_rank.py keeps: the input of an adapted module, once for all that read it, and its product with A.
    Dropout has an output and a mask for each. DoRA, with peft's own product, takes more: fp32 copies."""
    adapted = [each for each in architecture.targeted(targets) for _ in range(each.count // architecture.layers)]
    names = {each.name for each in adapted}
    rows = sum(width for readers, width in _inputs(architecture) if readers & names)
    if load.dropout:
        rows = 2 * sum(each.columns for each in adapted)
    return load.compute_bytes * (rows + r * len(adapted))


def _inputs(architecture: Architecture) -> tuple[tuple[set[str], int], ...]:
    """Which modules read the same tensor, and its width; the output projection reads what attention keeps anyway."""
    hidden = architecture.hidden
    return (
        ({"q_proj", "k_proj", "v_proj"}, hidden),
        ({"gate_proj", "up_proj"}, hidden),
        ({"down_proj"}, architecture.intermediate),
    )


def logit_bytes(architecture: Architecture, load: Workload) -> int:
    """12 bytes a logit at the peak: in the compute type, in fp32 its log-softmax and its gradient."""
    rows = load.batch * load.tokens
    return 12 * architecture.vocabulary * (rows if load.logit_rows is None else min(rows, load.logit_rows))
