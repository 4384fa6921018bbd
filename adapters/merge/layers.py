"""A model of which one layer is in memory: named tensors are asked for when all passes have come to where they belong.

Which of its modules take which tensors is read from the architecture, built without weights, and tried on a few tokens.
What does not fit that is told, for somebody who has the memory to hold the whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.nn import ModuleList, Parameter
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from adapters.base import CONFIG
from adapters.merge.models import NOTHING, Heard, Loaded, dense_config
from adapters.merge.named_tensors import NamedTensors, in_files
from adapters.merge.stations import Station, Stations, one_number
from adapters.merge.unmerged import brought_along, with_adapter

TRIED = 4
"""Tokens."""


class NotInLayers(Exception):
    """Why a model has to be whole in memory."""


class LayerByLayer:
    """One layer of its weights at once, or the embedding, or the head; each asked for once in a row of passes."""

    def of(
        self,
        directory: Path,
        tensors: NamedTensors,
        dtype: torch.dtype,
        config_changes: Mapping[str, Any] = NOTHING,
        adapter: Path | None = None,
    ) -> Loaded:
        bare = _without_weights(directory, dtype, config_changes)
        stations = list(_stations(bare, tensors))
        head_is_plain = _tried(bare, stations)
        weights = Stations(stations, tensors)
        if adapter is not None:
            weights.stay([bare.get_parameter(name) for name in brought_along(adapter)])
        model = bare if adapter is None else with_adapter(bare, adapter, directory)
        weights.put_on(bare)

        def passes(calls: Sequence[Callable[[], Any]], heard: Heard) -> Iterator[Any]:
            return weights.passes(calls, heard)

        return Loaded(model, head_is_plain, passes)

    def written(self, directory: Path, dtype: torch.dtype) -> Loaded:
        if "quantization_config" in json.loads((directory / CONFIG).read_text(encoding="utf-8")):
            raise NotInLayers(f"{directory.name} is quantised in its files")
        return self.of(directory, in_files(directory), dtype)


def _without_weights(directory: Path, dtype: torch.dtype, config_changes: Mapping[str, Any]) -> Any:
    config = dense_config(directory, config_changes)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with init_empty_weights(include_buffers=False):
        model = kind._from_config(config, dtype=dtype)
    for module in model.modules():
        for name, each in module.named_parameters(recurse=False):
            setattr(module, name, Parameter(one_number(math.nan, each), requires_grad=False))
    model.tie_weights()  # parameters of several names have become several
    if dtype != torch.float32 and (kept := model._keep_in_fp32_modules_strict):
        raise NotInLayers(f"{', '.join(sorted(kept))} stay in float32 in {kind.__name__}")
    model.config.use_cache = False
    return model.eval()


def _stations(model: Any, tensors: NamedTensors) -> Iterator[Station]:
    own = model.state_dict(keep_vars=True)
    names = {id(own[name]): name for name in tensors if name in own}
    strange = [name for name in tensors if name not in own] + [name for name in own if id(own[name]) not in names]
    if strange:
        raise NotInLayers(f"files and {type(model).__name__} name weights differently: {', '.join(strange[:3])}")
    if len(names) < len(tensors):
        raise NotInLayers(f"the files have two tensors for what is one in {type(model).__name__}")
    found: dict[str, Station] = {}
    for name, each in own.items():
        path = _called(model, name.rpartition(".")[0])
        found.setdefault(path, Station(path)).held[names[id(each)]] = each
    yield from found.values()


def _called(model: Any, path: str) -> str:
    """The module that is called where the weights of another one are used: the outermost of a list, as layers are."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), ModuleList):
            return ".".join(parts[: end + 1])
    return path


def _tried(model: Any, stations: Sequence[Station]) -> bool:
    """Whether logits are what the head says, no more. Weights are all one number here."""
    called: set[str] = set()
    heads: list[Any] = []
    hooks = [
        model.get_submodule(station.path).register_forward_pre_hook(lambda *_, path=station.path: called.add(path))
        for station in stations
    ]
    head = model.get_output_embeddings()
    if head is not None:
        hooks.append(head.register_forward_hook(lambda _, __, found: heads.append(found)))
    for station in stations:
        station.compute_narrow(model.get_submodule(station.path))  # or one number became as large as a head
        station.leave_only(1.0)
    try:
        with torch.no_grad():
            logits = model(input_ids=torch.arange(TRIED)[None]).logits
    except RuntimeError as error:
        raise NotInLayers(f"{type(model).__name__} does not take weights that are one number: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
        for station in stations:
            station.compute_as_usual(model.get_submodule(station.path))  # an adapter may copy modules
    if never := [station.path for station in stations if station.path not in called]:
        raise NotInLayers(f"{never[0]} of {type(model).__name__} is used without being called")
    return len(heads) == 1 and torch.equal(heads[0], logits)
