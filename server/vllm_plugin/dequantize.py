"""Defect: bitsandbytes dequantises NF4 weights wrongly where rows and blocks do not end together; see adapters.nf4.

Fix: the repair is applied when the first 4-bit layer is made, which is in the worker and nowhere else, so that the
API and engine processes never pay for importing bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from server.vllm_plugin.patches import Patch


def linear_method(stock: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, quant_config: Any) -> None:
        from adapters.nf4 import repair_dequantize

        stock(self, quant_config)
        repair_dequantize()

    return init


PATCHES = (
    (
        Patch(
            "vllm_bnb_plugin.quantization.linear:BitsAndBytesLinearMethod",
            "__init__",
            ("self", "quant_config"),
            linear_method,
        ),
    )
    if find_spec("vllm_bnb_plugin")
    else ()
)
