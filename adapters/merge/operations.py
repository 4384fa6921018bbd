"""What an adapter does to each tensor of the base, by its kind: checked here, computed when it is called for.

Everything computes in fp32. Knows no shards and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from adapters.base import WEIGHT
from adapters.convert.change import Change, Factors
from adapters.convert.kinds import adalora, loha, lokr, vera
from adapters.convert.lora import trained
from adapters.convert.source import Source
from adapters.errors import NotMergeable
from adapters.merge.copies import require_unchanged, without_copies
from adapters.merge.embeddings import split
from adapters.merge.peft_layer import THROUGH_PEFT, multiplied
from adapters.merge.tokens import Rows, split_tokens
from adapters.merge.vera import drawn_again
from adapters.peft_config import PROMPTING, require_known
from adapters.refusals import refuse
from adapters.safetensors_header import TensorSpan
from adapters.tensor_values import Matrix

if TYPE_CHECKING:
    import torch

ADDING = {"ADALORA": adalora, "LOHA": loha, "LOKR": lokr, "VERA": vera}
BIAS = ".bias"
TOKENS = "tokens"


@dataclass(frozen=True)
class Operation:
    """Of one tensor."""

    kind: str
    """In lower case, as people call it: `lora`, `dora`, `ia3`, `bias`, `whole`."""
    why: str
    compute: Callable[[torch.Tensor], torch.Tensor] = field(repr=False, compare=False)
    """The base's values in fp32, which it may use up, into the merged ones."""


Operations = Mapping[str, Operation]
"""By the base's tensor."""


def operations(source: Source) -> tuple[str, Operations]:
    """The adapter's kind, and what it does. Raises InvalidAdapter or NotMergeable; reads no values but those of copies
    of the base, when all shapes are right."""
    if source.config.get("fan_in_fan_out"):
        raise NotMergeable(
            "fan_in_fan_out is true: its base keeps weights the other way round (GPT-2's Conv1D), which is not merged "
            "here"
        )
    if source.kind == "LORA":
        rest, copies = without_copies(source)
        found = _lora(rest)
        require_unchanged(source, copies)
        return found
    require_nothing_else(source)
    if source.kind in ADDING:
        plan = ADDING[source.kind](source)
        changes = plan.changes if plan.merge_only is None else drawn_again(source)
        return plan.kind, dict(_added(plan.kind, changes))
    if source.kind in THROUGH_PEFT:
        kind = source.kind.lower()
        return kind, {
            module + WEIGHT: Operation(kind, f"PEFT's own {source.kind} layer, merged", compute)
            for module, compute in multiplied(source).items()
        }
    raise refuse("changes_prompt" if source.kind in PROMPTING else "not_lora", f"peft_type is {source.kind[:80]!r}")


def _lora(source: Source) -> tuple[str, Operations]:
    rest, tokens = split_tokens(source)
    ends = split(rest)
    done = dict(_added("lora", ends.changes))
    if tokens.keys() & done.keys():
        raise NotMergeable("it has a LoRA on the embedding and trained tokens besides; train one of the two")
    for name, rows in tokens.items():
        why = f"rows of {len(rows.indices)} tokens are replaced"
        done[name] = Operation(TOKENS, why, partial(_with_rows, source, rows))
    if done and not ends.rest.spans:
        require_known(rest.config)
        return "lora", done
    found = trained(ends.rest)
    done |= dict(_added(found.kind, found.changes))
    if found.kind == "dora":
        _require_weights(source, found.changes)
    for module, values in found.biases.items():
        name = module + BIAS
        if name not in source.base_weights.spans:
            if not values().any():
                continue
            raise NotMergeable(
                f"lora_B of {module} has a trained bias, and the layers of {source.base.name} have none to add it to; "
                "train with lora_bias=False"
            )
        done[name] = Operation("bias", "the bias of lora_B is added", partial(_plus, values))
    for name, span in found.whole.items():
        _require_same_shape(source, name, span)
        done[name] = Operation("whole", "trained as a whole, or saved along", partial(_replaced, source, span))
    return found.kind, done


def _require_weights(source: Source, modules: Collection[str]) -> None:
    """DoRA is defined by them, and a head that is the embedding has none under its name."""
    absent = [module for module in modules if not source.weights_beneath.is_plain(module + WEIGHT)]
    if absent:
        raise NotMergeable(f"DoRA on {absent[0]}, which is the embedding in {source.base.name}: train it without")


def _added(kind: str, changes: Mapping[str, Callable[[], Change]]) -> Iterator[tuple[str, Operation]]:
    how = "scaled row by row after B·A is added" if kind == "dora" else "W + ΔW"
    for module, change in changes.items():
        yield module + WEIGHT, Operation(kind, how, partial(_plus, change))


def _plus(change: Callable[[], Change], weight: torch.Tensor) -> torch.Tensor:
    import torch

    delta = change()
    if isinstance(delta, Factors):
        return weight.addmm_(torch.from_numpy(delta.b), torch.from_numpy(delta.a))
    return weight.add_(torch.from_numpy(delta))


def _replaced(source: Source, span: TensorSpan, _: torch.Tensor) -> torch.Tensor:
    import torch

    values: Matrix = source.values(span)
    return torch.from_numpy(values)


def _with_rows(source: Source, rows: Rows, weight: torch.Tensor) -> torch.Tensor:
    import torch

    return weight.index_copy_(0, torch.tensor(rows.indices), torch.from_numpy(source.values(rows.span)))


def _require_same_shape(source: Source, name: str, span: TensorSpan) -> None:
    own = shape_in_base(source, name)
    if span.shape != own:
        raise refuse("shape_mismatch", f"{name} is {span.shape}, in {source.base.name} it is {own}")


def shape_in_base(source: Source, name: str) -> tuple[int, ...]:
    """Unpacked, where it lies packed."""
    module = name.removesuffix(WEIGHT)  # the head is among them, also where it is the embedding
    if module in source.base.modules and name.endswith(WEIGHT):
        return source.base.modules[module]
    return source.base_weights.spans[name][1].shape


def require_nothing_else(source: Source) -> None:
    config = source.config
    if config.get("modules_to_save"):
        raise refuse("modules_to_save", f"modules_to_save is {str(config['modules_to_save'])[:120]!r}")
    if config.get("bias", "none") != "none":
        raise refuse("lora_bias", f"bias is {str(config['bias'])[:120]!r}, expected 'none'")
