"""FLOW merge, second: a plan carried out, one tensor in memory at a time, in fp32 and rounded once.

take up what is there → write the missing shards → configuration and tokenizer → check → record → rename
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import Conflict, MergeError
from adapters.merge.documents import RECORD, write_model_files, write_record
from adapters.merge.plan import FLOATS, STORED, Dtype, MergePlan, PlannedTensor
from adapters.merge.shard_file import Entry, write_shard
from adapters.merge.tensors import read_tensor, torch_types
from adapters.merge.unfinished import unfinished
from adapters.merge.verify import FILE, PICTURE

if TYPE_CHECKING:
    import torch

Progress = Callable[[str, int], None]
"""Called with a tensor's name and its bytes, when it is done."""
Check = Callable[[Path], Mapping[str, Any]]
"""Called with the whole directory before anybody can see it. What it returns goes into the record as `fidelity`; an
AdapterError that it raises ends the merge, and nothing is left but what is Unfaithful, which waits to be accepted."""


def merged_tensors(
    plan: MergePlan, shard: str | None = None, dtype: Dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Of one output shard, or of all: each computed in fp32 when it is asked for, and rounded once to `dtype`, by
    default the plan's."""
    for each in plan.planned:
        if shard is None or each.shard == shard:
            yield each.name, merged_tensor(plan, each, dtype)


def merged_tensor(plan: MergePlan, planned: PlannedTensor, dtype: Dtype | None = None) -> torch.Tensor:
    return _merged(plan, planned, STORED[dtype] if dtype and planned.dtype in FLOATS else planned.dtype)


def write_merged(
    plan: MergePlan,
    destination: Path,
    progress: Progress = lambda name, size: None,
    check: Check | None = None,
) -> Mapping[str, Any]:
    """`destination` becomes a Hugging Face directory, whole or not at all; returns what its loraplex-merge.json says.

    The same plan takes up what a crash left. Conflict where there is something else; MergeError for values that the
    plan's type cannot hold.
    """
    destination = destination.absolute()
    if (there := _is_there(plan, destination)) is not None:
        return there
    with unfinished(destination, plan.digest, (FILE, PICTURE)) as work:
        for shard in plan.shards:
            entries = [Entry(each.name, each.dtype, each.shape, each.size_bytes) for each in plan.in_shard(shard)]
            if shard not in work.shards:
                work.done(shard, write_shard(work.path / shard, entries, _told(plan, shard, progress)))
            else:
                for entry in entries:
                    progress(entry.name, entry.size_bytes)
        write_model_files(plan, work.path)
        found = check(work.path) if check is not None else None
        return write_record(plan, work.path, work.shards, found)


def _is_there(plan: MergePlan, destination: Path) -> Mapping[str, Any] | None:
    """The record of a finished merge of the same plan."""
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return None
    try:
        found: Mapping[str, Any] = json.loads((destination / RECORD).read_text(encoding="utf-8"))
        if found["plan"] == plan.digest:
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise Conflict(f"{destination} is there and holds something else; name another directory", code="not_empty")


def _told(plan: MergePlan, shard: str, progress: Progress) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in merged_tensors(plan, shard):
        yield name, tensor
        progress(name, tensor.nbytes)


def _merged(plan: MergePlan, planned: PlannedTensor, dtype: str) -> torch.Tensor:
    import torch

    path, span = plan.weights.spans[planned.origin]
    if planned.operation is None and not planned.decoded:
        kept = read_tensor(path, span)
        return kept if span.dtype == dtype else _rounded(planned.name, kept, dtype)
    with torch.no_grad():
        decoded = planned.decoded
        weight = torch.from_numpy(plan.weights.values(planned.origin)) if decoded else read_tensor(path, span).float()
        if planned.operation is not None:
            weight = planned.operation.compute(weight)
        return _rounded(planned.name, weight, dtype)


def _rounded(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:

    found = tensor.to(torch_types()[dtype])
    if not _is_finite(found):
        reason = "which it was before" if not _is_finite(tensor) else "though its values are: use bfloat16"
        raise MergeError(f"{name} is not finite as {found.dtype}, {reason}", code="non_finite_merge")
    return found


def _is_finite(tensor: torch.Tensor) -> bool:
    """Without the copies that torch.isfinite makes."""
    import torch

    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())
