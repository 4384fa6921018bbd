"""What a wish for a merged engine means: the type of its weights, the base's values and the budget, as an order for the
process that merges. It knows no jobs and no engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from adapters.merge.bases import Asked
from adapters.merge.orders import BasePlace, ExportOrder, MergeOrder, Order
from server.errors import BadRequest
from server.merge_fields import Budget
from server.settings import Settings

Values = Literal["served", "auto", "dequantized", "original"]
"""Which values of the base: `served` are those that the base engine computes with. In NF4 it is like `auto`, which is
`original` where there are such: NF4 of what NF4 has left would lose the adapter."""
Quantization = Literal["none", "nf4"]
NF4: Literal["nf4"] = "nf4"


def stored_as(quantization: Quantization, settings: Settings) -> str:
    """The type of the weights. Raises BadRequest."""
    if quantization == "none":
        return settings.dtype
    if settings.dtype == "float32":
        raise BadRequest(
            "quantization is 'nf4', which computes in 16 bits, and this server in float32 (dtype); leave it out",
            param="quantization",
        )
    return NF4


def order_of(
    params: Mapping[str, Any],
    base: BasePlace,
    adapter: str,
    destination: Path,
    out: Path,
    rows: tuple[str, ...],
    settings: Settings,
) -> Order:
    """`params`: `base`, `dtype` and `accept_loss` of the job; `rows`: files on which it is measured. NF4 is made of a
    whole merge, so it becomes `out`, in the job's own directory; else `destination` appears."""
    values, proof = _values(params, settings), budget(params, settings).proof(settings.merge_probe_tokens, rows)
    if params["dtype"] == NF4:
        return ExportOrder(adapter, base, str(out), NF4, NF4, values, proof)
    return MergeOrder(adapter, base, str(destination), values, params["dtype"], proof)


def budget(params: Mapping[str, Any], settings: Settings) -> Budget:
    """A merge is measured against the adapter on what it was trained on. What an unquantised server serves may be far
    from that already, without a merge; then the merge is not to blame, and the LoRA path no better."""
    is_plain = settings.quantization == "none" and params["dtype"] != NF4
    return Budget(accept_loss=params["accept_loss"] or (is_plain and params["base"] == "served"))


def _values(params: Mapping[str, Any], settings: Settings) -> Asked:
    asked: Values = params["base"]
    if asked != "served":
        return asked
    if params["dtype"] == NF4:
        return "auto"
    return "dequantized" if settings.quantization == "nf4" else "original"
