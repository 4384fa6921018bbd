"""What one step holds beside weights and states: activations, logits, gradients on their way. Arithmetic on shapes.

Counted in the manner of Korthikanti et al. 2022, section 4.1, for what transformers, peft and low_rank.py keep today; a
test compares it with what autograd really holds. It knows nothing of configurations.
"""

from __future__ import annotations

from dataclasses import dataclass

from adapters.train.architecture import Architecture, Ranks

LOGIT_BYTES = 12
"""At the peak of the backward pass of cross-entropy: log-softmax, its gradient and that of the loss, each in fp32."""


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
    fp32_products: bool = False
    """The adapter's products are peft's own, which cast what goes in: those of AdaLoRA and DoRA."""
    importance: bool = False
    """Of every trained parameter three fp32 averages are kept, as AdaLoRA's allocator does."""


def activation_bytes(architecture: Architecture, load: Workload, ranks: Ranks | None) -> int:
    """What autograd keeps of the blocks for the backward pass; `ranks` None: of full fine-tuning.

    With checkpointing (Chen et al. 2016) the input of every layer, and all of one.
    """
    tokens = load.batch * load.tokens
    layer = _layer_bytes(architecture, load, ranks) * tokens
    if load.checkpointing:
        return architecture.layers * architecture.hidden * load.compute_bytes * tokens + layer
    return architecture.layers * layer


def logit_bytes(architecture: Architecture, load: Workload) -> int:
    rows = load.batch * load.tokens
    return LOGIT_BYTES * architecture.vocabulary * (rows if load.logit_rows is None else min(rows, load.logit_rows))


def step_bytes(architecture: Architecture, load: Workload, ranks: Ranks | None) -> tuple[int, int]:
    """Activations and logits as they are at the step's peak, which is either in the loss, where a checkpointed layer is
    not computed again yet, or in the backward pass, where logits are gone and gradients are under way."""
    kept, logits = activation_bytes(architecture, load, ranks), logit_bytes(architecture, load)
    tokens = load.batch * load.tokens
    outside = tokens * (4 + 3 * load.compute_bytes) * architecture.hidden  # embedding, last norm, its gradient
    passing = tokens * load.compute_bytes * (3 * architecture.intermediate + 4 * architecture.hidden)
    again = _layer_bytes(architecture, load, ranks) * tokens if load.checkpointing else 0
    in_loss, in_backward = kept - again + logits, kept + passing
    return kept - again + outside + max(0, in_backward - in_loss), logits


def _layer_bytes(architecture: Architecture, load: Workload, ranks: Ranks | None) -> int:
    """Of one token in one layer: two norms that compute in fp32, queries, keys and values repeated to all heads, the
    attention's output and its mask, gate, activation and up of a gated MLP; and the inputs of what is trained."""
    hidden, inner, size = architecture.hidden, architecture.intermediate, load.compute_bytes
    attention = architecture.heads * architecture.head_width
    kept = 4 * (2 * hidden + architecture.heads + 2) + size * (4 * attention + 3 * inner + load.tokens)
    if ranks is None or not ranks.r:
        return kept + size * (4 * hidden + inner)
    if load.fp32_products and size == 2:
        return kept + _fp32_adapter_bytes(architecture, ranks)
    return kept + _adapter_bytes(architecture, load, ranks)


def _adapter_bytes(architecture: Architecture, load: Workload, ranks: Ranks) -> int:
    """What low_rank.py keeps: the input of an adapted module, once for all that read it, and its product with A.
    Dropout has an output and a mask for each."""
    adapted = architecture.targeted(ranks.targets)
    names = {each.name for each in adapted}
    rows = sum(width for readers, width in _inputs(architecture) if readers & names)
    if load.dropout:
        rows = 2 * sum(each.columns * each.count for each in adapted) // architecture.layers
    return load.compute_bytes * (rows + architecture.rank_sum(ranks) // architecture.layers)


def _fp32_adapter_bytes(architecture: Architecture, ranks: Ranks) -> int:
    """peft's own product: every adapted module has an fp32 copy of its input, its product with A, and with B."""
    widths = sum((each.columns + each.rows) * each.count for each in architecture.targeted(ranks.targets))
    return 4 * (widths + architecture.rank_sum(ranks)) // architecture.layers


def _inputs(architecture: Architecture) -> tuple[tuple[set[str], int], ...]:
    """Which modules read the same tensor, and its width; the output projection reads what attention keeps anyway."""
    hidden = architecture.hidden
    return (
        ({"q_proj", "k_proj", "v_proj"}, hidden),
        ({"gate_proj", "up_proj"}, hidden),
        ({"down_proj"}, architecture.intermediate),
    )
