"""An adapter that is there is trained further: its weights in place of fresh ones. A plain LoRA of the same form.

It knows nothing of where the adapter comes from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapters.errors import ConfigError
from adapters.upload import WEIGHTS


def go_on_from(model: Any, directory: Path) -> None:
    """Raises ConfigError where the adapter has other matrices than the one that `peft` in the configuration makes."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        given = load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model.adapter_name_or_path: {directory} holds no {WEIGHTS}: {error}") from error
    fresh = get_peft_model_state_dict(model, save_embedding_layers=False)
    there, wanted = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in (given, fresh))
    if there != wanted:
        name = min(name for name in {*there, *wanted} if there.get(name) != wanted.get(name))
        raise ConfigError(
            f"model.adapter_name_or_path: {directory} has other matrices than this configuration: {name} is "
            f"{there.get(name, 'not there')}, expected {wanted.get(name, 'none')}; give peft.r and peft.target_modules "
            "as that adapter has them"
        )
    set_peft_model_state_dict(model, given)
