"""What we know of one adapter version: a frozen record, stored in the registry and shown over HTTP.

It knows nothing of files, databases or engines; those modules pass it around.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Manifest:
    """Facts read from an adapter's own files, never from what a client claims about them; but for the lineage."""

    digest: str
    """`sha256:<64 hex>` over the names and bytes of all kept files: the identity of the version."""
    size_bytes: int
    """Sum of the kept files."""
    kind: str
    """`lora` for what is served, whatever it was; else PEFT's `peft_type` in lower case, or `dora`."""
    rank: int
    """The largest rank of any module; 0 where the kind has none."""
    alpha: float
    """`lora_alpha` of the configuration; 0 where it has none."""
    target_modules: tuple[str, ...]
    """Last name parts of the modules that carry weights, sorted: `("down_proj", "q_proj")`."""
    module_count: int
    """How many modules of the base the adapter changes."""
    parameter_count: int
    dtype: str
    """Storage type of the tensors as safetensors spells it: `F32`, `BF16`, or `mixed`."""
    base_model: str
    """`base_model_name_or_path` as the adapter gives it; information, not a check."""
    base_fingerprint: str | None = None
    """Fingerprint of the base it was trained on, where its maker recorded one."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Kept file name → `sha256` hex of its bytes."""
    warnings: tuple[str, ...] = ()
    """Things a person should know that do not prevent serving."""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    """Where it comes from: training run, seed, data digest, tool versions, parents. What the uploader said of it
    stands here too, as far as the files do not say it."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Evaluation results its maker recorded."""
    conversion: Mapping[str, Any] = field(default_factory=dict)
    """How it became a plain LoRA, where it was another kind: from what, with which error, and the digests of the files
    that were sent. Empty: it is served as it came."""
    merge_only: str | None = None
    """Why it cannot be swapped per request, only merged into the base; None where it can."""

    @property
    def verdict(self) -> str:
        """In words, for a person."""
        if self.merge_only is not None:
            return f"merge only: {self.merge_only}"
        if not self.conversion:
            return "served as it came"
        source, error = self.conversion["from"], self.conversion.get("error", 0.0)
        if not error:
            return f"converted exactly from {source}"
        return f"converted from {source}: what it changes of the weights is off by {error:.2%}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        values = dict(data)
        for name in ("target_modules", "warnings"):
            values[name] = tuple(values.get(name, ()))
        return cls(**values)
