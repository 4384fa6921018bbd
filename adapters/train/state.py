"""Everything of a run that changes while it goes, and how it is written down so that the run goes on bit for bit.

Weights, optimizer, random numbers, step, and the best weights so far. The order of the data needs no state of its own:
it follows from the seed, and the place in it from the step. It knows nothing of directories but the one it is given.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.train.adalora import allocation_state, load_allocation_state

WEIGHTS, BEST, TENSORS, NUMBERS = "trained.safetensors", "best.safetensors", "state.pt", "state.json"


@dataclass
class TrainingState:
    model: Any
    optimizer: torch.optim.Optimizer
    total: int
    """Steps of the whole run."""
    step: int = 0
    base_loss: float = math.nan
    """On the held-out examples; measured once."""
    best_step: int = 0
    best_loss: float = math.inf
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    fruitless: int = 0
    """Evaluations in a row that found no lower loss."""

    def weigh(self, loss: float) -> None:
        """Take note of the held-out loss of the weights as they are now."""
        if loss < self.best_loss:
            self.best_step, self.best_loss, self.fruitless = self.step, loss, 0
            self.best_weights = {name: value.clone() for name, value in _trained(self.model).items()}
        else:
            self.fruitless += 1

    def take_best(self) -> None:
        """The weights with the lowest held-out loss."""
        _put(self.model, self.best_weights)

    def write(self, directory: Path) -> None:
        save_file(_trained(self.model), directory / WEIGHTS)
        save_file(self.best_weights, directory / BEST)
        tensors = {"optimizer": self.optimizer.state_dict(), "torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["cuda"] = torch.cuda.get_rng_state_all()
        tensors["allocation"] = allocation_state(self.model)
        torch.save(tensors, directory / TENSORS)
        numbers = {
            "step": self.step,
            "base_loss": self.base_loss,
            "best_step": self.best_step,
            "best_loss": self.best_loss,
            "fruitless": self.fruitless,
            "python": random.getstate(),
        }
        (directory / NUMBERS).write_text(json.dumps(numbers), encoding="utf-8")

    def read(self, directory: Path) -> None:
        _put(self.model, load_file(directory / WEIGHTS))
        self.best_weights = load_file(directory / BEST)
        tensors = torch.load(directory / TENSORS, weights_only=True)
        self.optimizer.load_state_dict(tensors["optimizer"])
        torch.set_rng_state(tensors["torch"])
        if "cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(tensors["cuda"])
        load_allocation_state(self.model, tensors["allocation"])
        numbers = json.loads((directory / NUMBERS).read_text(encoding="utf-8"))
        version, internal, gauss = numbers.pop("python")
        random.setstate((version, tuple(internal), gauss))
        for name, value in numbers.items():
            setattr(self, name, value)


def _trained(model: Any) -> dict[str, Tensor]:
    return {
        name: parameter.detach().contiguous() for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def _put(model: Any, weights: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
