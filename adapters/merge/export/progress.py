"""How far an export is, told to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable

Told = Callable[[str, int, int], None]
"""What is being done, how much of it is done, and how much there is."""


class Counter:
    """Called with a name and its size, as merging and writing do after each tensor."""

    def __init__(self, told: Told, what: str, total: int) -> None:
        self._told, self._what, self._total, self._done = told, what, total, 0
        self("", 0)

    def __call__(self, name: str, size: int) -> None:
        self._done += size
        self._told(self._what, self._done, self._total)
