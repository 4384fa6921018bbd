"""The weights of a model, in memory only while a pass is where they are used: a layer, an embedding, the head.

Each pass goes from station to station, as torch's hooks tell; nothing else of how the model computes is known here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from adapters.merge.lanes import current_lane, side_by_side
from adapters.merge.narrow import Narrow, narrow_of
from adapters.train.allocator import give_back

Result = TypeVar("Result")


class Station:
    """A module, and what has to be there before it computes."""

    def __init__(self, path: str) -> None:
        self.path = path
        """Of the module, in the model."""
        self.held: dict[str, torch.nn.Parameter | Tensor] = {}
        """By the name that their values have."""
        self._narrow: Narrow | None = None

    def compute_narrow(self, module: Any) -> None:
        """Where that is possible, what is called here computes with what it is filled with as narrow as it comes."""
        if len(self.held) == 1 and (narrow := narrow_of(module)) is not None:
            self._narrow = module.forward = narrow

    def compute_as_usual(self, module: Any) -> None:
        if self._narrow is not None:
            self._narrow = None
            del module.forward

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        for name, own in self.held.items():
            self._put(own, tensors[name])

    def stay(self, parameters: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> None:
        for name in [name for name, own in self.held.items() if any(own is each for each in parameters)]:
            self._put(self.held.pop(name), tensors[name])

    def leave_only(self, value: float) -> None:
        """One number takes the place of each, so that nothing but its shape is left."""
        for own in self.held.values():
            self._put(own, one_number(value, own))

    def _put(self, own: Tensor, values: Tensor) -> None:
        if self._narrow is not None:
            self._narrow.hold(values)
        else:
            own.data = values.to(own.dtype)


class Stations:
    def __init__(self, stations: Iterable[Station], tensors: Mapping[str, Tensor]) -> None:
        self._stations = list(stations)
        self._tensors = tensors
        self._filled: list[Station] = []
        self._inside: Counter[Station] = Counter()
        for station in self._stations:
            station.leave_only(math.nan)

    def stay(self, parameters: Sequence[Tensor]) -> None:
        """These are in memory from now on, and whoever writes into them is not written over."""
        for station in self._stations:
            station.stay(parameters, self._tensors)

    def put_on(self, model: Any) -> None:
        """`model`: the one that they were found in, whatever has been put around its modules meanwhile."""
        for station in self._stations:
            module = model.get_submodule(station.path)
            station.compute_narrow(module)
            module.register_forward_pre_hook(self._arriving(station), prepend=True)
            module.register_forward_hook(self._leaving(station), always_call=True)

    def passes(self, calls: Sequence[Callable[[], Result]], heard: Callable[[int, int], None]) -> Iterator[Result]:
        """All of them through one station before the next is filled. `heard`: with how many were, and all that are."""
        reached: set[Station] = set()

        def fill(station: Any) -> None:
            self._fill(station)
            reached.add(station)
            heard(len(reached), len(self._stations))

        try:
            yield from side_by_side([partial(_without_gradients, call) for call in calls], fill)
        finally:
            self._empty(self._filled)

    def _arriving(self, station: Station) -> Callable[..., None]:
        def arrive(*_: Any) -> None:
            lane = current_lane()
            if lane is None:
                self._fill(station)
            elif station not in self._filled:
                lane.wait_for(station)
            self._inside[station] += 1

        return arrive

    def _leaving(self, station: Station) -> Callable[..., None]:
        def leave(*_: Any) -> None:
            self._inside[station] -= 1

        return leave

    def _fill(self, station: Any) -> None:
        if station not in self._filled:
            self._empty([each for each in self._filled if not self._inside[each]])
            give_back()
            station.fill(self._tensors)
            self._filled.append(station)

    def _empty(self, stations: Iterable[Station]) -> None:
        for station in list(stations):
            station.leave_only(math.nan)
            self._filled.remove(station)


def one_number(value: float, like: Tensor) -> Tensor:
    """Shaped like another tensor, in the memory of one element."""
    return torch.full((), value, dtype=like.dtype).expand(like.shape)


def _without_gradients(call: Callable[[], Result]) -> Result:
    """Which threads turn on for themselves."""
    with torch.no_grad():
        return call()
