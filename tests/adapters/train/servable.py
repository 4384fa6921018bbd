"""The methods that claim to be servable, each as a section `peft`, and whether its base is in NF4.

`test_methods.py` tries them on a tiny base, `tests/flows/test_trained.py` in the engine.
"""

from __future__ import annotations

from typing import Any

SMALL: dict[str, Any] = {"r": 4, "lora_alpha": 8}
ADALORA: dict[str, Any] = {"method": "adalora", "adalora": {"init_r": 6, "target_r": 3}}
PATTERNS: dict[str, Any] = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
SERVABLE: dict[str, tuple[dict[str, Any], bool]] = {
    "lora": (SMALL, False),
    "qlora": (SMALL | {"method": "qlora"}, True),
    "rslora with patterns": (SMALL | PATTERNS, True),
    "gaussian": (SMALL | {"init_lora_weights": "gaussian"}, True),
    "orthogonal": (SMALL | {"init_lora_weights": "orthogonal"}, True),
    "loftq": (SMALL | {"init_lora_weights": "loftq"}, True),
    "pissa": (SMALL | {"init_lora_weights": "pissa"}, False),
    "olora": (SMALL | {"init_lora_weights": "olora"}, False),
    "adalora": (ADALORA, False),
    "adalora on nf4": (ADALORA, True),
}
