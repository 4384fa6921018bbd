"""What a kind of adapter changes, module by module, before any value is computed. Knows no kind itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapters.convert.change import Change


@dataclass(frozen=True)
class Plan:
    """Names and shapes are checked; values are read when a change is called for."""

    kind: str
    """In lower case, as people call it: `adalora`, `dora`, `loha`."""
    changes: Mapping[str, Callable[[], Change]] = field(default_factory=dict)
    """Module → its ΔW."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Worth telling, beside the errors."""
    merge_only: str | None = None
    """Why no LoRA can stand for it, however it is approximated; a merge can."""
    merges: bool = False
    """Whether it is kept for a merge where the caller does not accept the LoRA's error. Otherwise it is refused."""
