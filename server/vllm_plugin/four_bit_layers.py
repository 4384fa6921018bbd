"""What 4-bit layers need from bitsandbytes on a CPU, done when the first one is made.

Defect: it dequantises NF4 weights wrongly where rows and blocks do not end together (adapters.nf4). And it is slow
where bf16 is emulated (fp32_products).

The first layer is made in the worker and nowhere else, so the API and engine processes never pay for importing
bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from server.vllm_plugin.patches import Patch


def linear_method(stock: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, quant_config: Any) -> None:
        from adapters.nf4 import repair_dequantize
        from server.vllm_plugin import makes_faster
        from server.vllm_plugin.fp32_products import widen_products

        stock(self, quant_config)
        repair_dequantize()
        if makes_faster():
            widen_products()

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
