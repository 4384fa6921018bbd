"""A report as a picture: KL and losses of each variant, and what each format keeps, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapters.merge.formats import TARGETS
from adapters.merge.report import FidelityReport
from adapters.merge.report_table import ONTO, SHORT, label
from adapters.train.charts import layer_of

SMALLEST_KL = 1e-6
"""Where the logarithmic axis begins: what is below is nothing but the order of additions."""


def draw(report: FidelityReport, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(19, 5), layout="constrained")
    FigureCanvasAgg(figure)
    divergence, losses, kept = figure.subplots(1, 3)
    _draw_divergence(divergence, report)
    _draw_losses(losses, report)
    _draw_kept(kept, report)
    figure.savefig(path, dpi=110)


def _draw_divergence(axes: Any, report: FidelityReport) -> None:
    others = report.variants[1:]
    axes.barh([label(each) for each in others], [max(each.task.kl, SMALLEST_KL) for each in others])
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set(xlabel="KL to the adapter in fp32 (nats per token)", title="how far from the adapter")


def _draw_losses(axes: Any, report: FidelityReport) -> None:
    places = range(len(report.variants))
    axes.barh([place - 0.2 for place in places], [each.task.loss for each in report.variants], 0.4, label="task")
    axes.barh(
        [place + 0.2 for place in places], [each.general.loss for each in report.variants], 0.4, label="general text"
    )
    axes.set_yticks(places, [label(each) for each in report.variants])
    axes.invert_yaxis()
    axes.axvline(report.reference.task.loss, linestyle=":", color="grey")
    axes.set(xlabel="loss (nats per token)", title="what it can do")
    axes.legend()


def _draw_kept(axes: Any, report: FidelityReport) -> None:
    """The dotted line: all of it. Of the other base only NF4 is measured."""
    for base in dict.fromkeys(module.base for module in report.modules):
        for stored in TARGETS:
            layers = _by_layer(report, base, stored)
            if layers:
                axes.plot(*zip(*layers, strict=True), marker=".", label=f"{SHORT[stored]}, onto {ONTO[base]}")
    axes.axhline(1.0, linestyle=":", color="grey")
    axes.set(xlabel="layer", ylabel="share of ΔW that is kept", title="what each format keeps of the change")
    axes.legend()


def _by_layer(report: FidelityReport, base: str, stored: str) -> list[tuple[int, float]]:
    found: dict[int, list[tuple[float, float]]] = {}
    for module in report.modules:
        if module.base == base and stored in module.formats:
            layer = found.setdefault(layer_of(module.tensor), [])
            layer.append((module.size**2, module.formats[stored].kept))
    return [
        (layer, sum(size * kept for size, kept in each) / sum(size for size, _ in each))
        for layer, each in sorted(found.items())
    ]
