"""What references were found to mean, each with the revision of its adapter at which that was read.

Every change of an adapter counts its revision up in the same transaction, whichever process makes it. So nobody has to
tell that what is kept here is out of date: whoever uses it compares the revision first. What is kept is the versions
that a reference may mean, not the one that a request gets, which is chosen anew each time. Knows no database.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from adapters.records import Adapter

MOST = 1024
"""Those used last; each has the manifests of its versions."""


class Meanings:
    """Safe to share between threads."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._kept: OrderedDict[tuple[str, str], Adapter] = OrderedDict()
        self._turn = threading.Lock()

    def find(self, name: str, ref: str) -> Adapter | None:
        """As of its `revision`."""
        with self._turn:
            kept = self._kept.get((name, ref))
            if kept is not None:
                self._kept.move_to_end((name, ref))
            return kept

    def keep(self, name: str, ref: str, meant: Adapter) -> None:
        """What was read at `meant.revision` or later."""
        with self._turn:
            self._kept[name, ref] = meant
            self._kept.move_to_end((name, ref))
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
