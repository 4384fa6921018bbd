"""AdaLoRA's own work beside the loss: keeping P and Q orthogonal, and taking ranks away (Zhang et al. 2023).

peft adds the orthogonality term to `outputs.loss`, once for every batch that is accumulated and in evaluations too,
and never calls its allocator itself. Here the term goes into the gradients alone, once a step, and the allocator runs
after every step. Every function does nothing to a model of another method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.adalora import AdaLoraModel
from torch import Tensor

from adapters.convert.source import PREFIX

HEAT_MAP = "ranks.png"
ADAPTER = "default"
AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def is_adalora(model: Any) -> bool:
    return isinstance(getattr(model, "base_model", None), AdaLoraModel)


def add_orthogonality(model: Any) -> None:
    """To the gradients, before they are clipped."""
    if is_adalora(model) and (weight := _config(model).orth_reg_weight):
        (weight * orthogonality(model)).backward()


def orthogonality(model: Any) -> Tensor:
    """R(P, Q): the mean of ‖A·Aᵀ - 1‖ and ‖Bᵀ·B - 1‖ over all modules."""
    terms = []
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            square = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            terms.append(torch.linalg.matrix_norm(square - torch.eye(len(square), device=square.device)))
    return torch.stack(terms).mean()


def reallocate(model: Any, step: int) -> None:
    """After the optimizer's step, while its gradients are there: importance is weight times gradient."""
    if is_adalora(model):
        model.base_model.update_and_allocate(step)


def has_settled(model: Any, step: int) -> bool:
    """Whether every rank that is to go is gone; always, for other methods."""
    return not is_adalora(model) or step >= _config(model).total_step - _config(model).tfinal


def settle(model: Any) -> None:
    """At the end: a run that ended early may have values outside of the last mask, and they would not be saved."""
    if is_adalora(model) and (pattern := _config(model).rank_pattern):
        model.base_model.rankallocator.mask_using_rank_pattern(model.base_model.model, pattern)


def kept_ranks(model: Any) -> Mapping[str, int]:
    """Module of the base → how many of its singular values are left. Empty for other methods."""
    if not is_adalora(model):
        return {}
    return {
        name.partition(".lora_E")[0].removeprefix(PREFIX): int(torch.count_nonzero(parameter))
        for name, parameter in model.named_parameters()
        if ".lora_E" in name
    }


def allocation_state(model: Any) -> dict[str, Any]:
    """What a resumed run needs beside the weights, in their full size: importances so far, and what is masked."""
    if not is_adalora(model):
        return {}
    allocator = model.base_model.rankallocator
    averages = {name: dict(getattr(allocator, name)) for name in AVERAGES}
    return {**averages, "rank_pattern": _config(model).rank_pattern}


def load_allocation_state(model: Any, state: Mapping[str, Any]) -> None:
    if is_adalora(model):
        for name in AVERAGES:
            setattr(model.base_model.rankallocator, name, dict(state[name]))
        _config(model).rank_pattern = state["rank_pattern"]


def draw_heat_map(ranks: Mapping[str, int], path: Path) -> None:
    """One row a kind of module, one column a layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = list(dict.fromkeys(map(_kind, ranks))), list(dict.fromkeys(map(_layer, ranks)))
    cells = {(_kind(module), _layer(module)): rank for module, rank in ranks.items()}
    grid = [[cells.get((row, column), 0) for column in columns] for row in rows]
    figure = Figure(figsize=(3 + 0.3 * len(columns), 1.5 + 0.3 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="layer")
    image = axes.imshow(grid, aspect="auto", vmin=0, cmap="viridis")
    axes.set_xticks(range(len(columns)), columns, fontsize=7)
    axes.set_yticks(range(len(rows)), rows)
    figure.colorbar(image, label="rank kept")
    figure.savefig(path, dpi=110)


def _config(model: Any) -> Any:
    return model.peft_config[ADAPTER]


def _kind(module: str) -> str:
    return module.rpartition(".")[2]


def _layer(module: str) -> str:
    return next(_numbers(module), "")


def _numbers(module: str) -> Iterator[str]:
    return (part for part in module.split(".") if part.isdecimal())
