"""Pictures of an inspection and of a sweep, as PNG files. matplotlib is loaded when one is drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.train.inspection import Found

LAYER = re.compile(r"\.(\d+)\.")


def draw_inspection(found: Sequence[Found], path: Path) -> None:
    """Two maps, a row a layer and a column a kind of module: how much changes, and in how many directions."""
    figure, axes = _figure(2)
    _map(figure, axes[0], found, lambda each: each.change, "‖ΔW‖ / ‖W‖")
    _map(figure, axes[1], found, lambda each: each.effective, "effective directions")
    figure.savefig(path, dpi=110)


def draw_sweep(curves: Mapping[str, Sequence[tuple[int, float]]], base: float, path: Path) -> None:
    """A curve for each choice of modules and alpha: held-out loss over rank."""
    figure, (axes,) = _figure(1)
    for name, points in curves.items():
        axes.plot([rank for rank, _ in points], [loss for _, loss in points], marker="o", label=name)
    axes.axhline(base, linestyle=":", color="grey", label=f"base {base:.2f}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        ranks := sorted({rank for points in curves.values() for rank, _ in points}), [str(r) for r in ranks]
    )
    axes.set(xlabel="rank", ylabel="held-out loss (nats per trained token)")
    axes.legend()
    figure.savefig(path, dpi=110)


def _figure(count: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 6 * count, 5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _map(figure: Any, axes: Any, found: Sequence[Found], value: Callable[[Found], float], title: str) -> None:
    kinds = list(dict.fromkeys(each.module.rpartition(".")[2] for each in found))
    layers = sorted({layer_of(each.module) for each in found})
    grid = [[math.nan] * len(kinds) for _ in layers]
    for each in found:
        grid[layers.index(layer_of(each.module))][kinds.index(each.module.rpartition(".")[2])] = value(each)
    image = axes.imshow(grid, aspect="auto", origin="lower")
    axes.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set(title=title, ylabel="layer")
    figure.colorbar(image, ax=axes)


def layer_of(module: str) -> int:
    """-1: of no layer."""
    match = LAYER.search(module)
    return int(match[1]) if match else -1
