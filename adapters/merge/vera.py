"""A VeRA whose random matrices were not saved: drawn again as PEFT 0.21 draws them, from the key in its configuration.

A torch that draws other numbers from the same seed would give another model, which nothing here can notice.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np

from adapters.convert.change import Factors
from adapters.convert.kinds import LARGEST_RANK, VERA
from adapters.convert.source import Parts, Source, require_parts, require_shapes
from adapters.refusals import refuse

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapters.tensor_values import Matrix


def drawn_again(source: Source) -> Mapping[str, Callable[[], Factors]]:
    """Module → its ΔW. Raises InvalidAdapter."""
    rank, key = source.config.get("r"), source.config.get("projection_prng_key")
    if type(rank) is not int or not 1 <= rank <= LARGEST_RANK:
        raise refuse("bad_config", f"r is {str(rank)[:120]!r}, expected a whole number from 1 to {LARGEST_RANK}")
    if type(key) is not int or not 0 <= key < 1 << 63:
        raise refuse("bad_config", f"projection_prng_key is {str(key)[:120]!r}, expected a whole number")
    modules = source.modules(VERA, "a VeRA")
    for module, parts in modules.items():
        require_parts(module, parts, ("lambda_b", "lambda_d"))
        require_shapes(module, parts, {"lambda_b": (source.base.modules[module][0],), "lambda_d": (rank,)})
    shapes = [source.base.modules[module] for module in modules]
    largest = max(rows for rows, _ in shapes), max(columns for _, columns in shapes)
    return {module: partial(_change, source, module, parts, rank, key, largest) for module, parts in modules.items()}


@cache
def _matrices(rank: int, key: int, rows: int, columns: int) -> tuple[Matrix, Matrix]:
    """A and B, of the largest module that it is on; the others take their first rows and columns."""
    import torch
    from peft.tuners.vera.model import _kaiming_init

    generator = torch.Generator(device="cpu").manual_seed(key)
    a = _kaiming_init((rank, columns), generator=generator)
    return a.numpy(), _kaiming_init((rows, rank), generator=generator).numpy()


def _change(source: Source, module: str, parts: Parts, rank: int, key: int, largest: tuple[int, int]) -> Factors:
    rows, columns = source.base.modules[module]
    a, b = _matrices(rank, key, *largest)
    lambda_b, lambda_d = (source.values(parts[f"lambda_{side}"]) for side in "bd")
    return Factors(
        np.asarray(lambda_b[:, None] * b[:rows], np.float32), np.asarray(lambda_d[:, None] * a[:, :columns], np.float32)
    )
