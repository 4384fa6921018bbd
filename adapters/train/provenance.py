"""`loraplex.json`: where an adapter comes from and what it needs, kept in its directory.

adapter_config.json records neither the base's identity nor its quantisation nor the chat template, so an adapter on
the wrong base of equal shape loads silently; the server reads this file and refuses.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

from adapters.base import BaseModel
from adapters.train.config import TrainConfig, with_files
from adapters.train.data import digest_of
from adapters.train.evaluate import Verdict
from adapters.train.labels import chat_template_sha256
from adapters.train.model import compute_dtype
from adapters.train.prepare import Prepared

PROVENANCE = "loraplex.json"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def write_provenance(
    config: TrainConfig, data: Prepared, tokenizer: Any, verdict: Verdict, steps: int, path: Path
) -> None:
    quantization, split = config.quantization, data.split
    record = {
        "base_fingerprint": BaseModel.read(config.model.model_name_or_path).fingerprint,
        "quantization": quantization.model_dump(exclude_none=True) if quantization.load_in_4bit else None,
        "chat_template_sha256": chat_template_sha256(tokenizer),
        "lineage": {
            "seed": config.training.seed,
            "dtype": str(compute_dtype(config.model)).removeprefix("torch."),
            "steps": steps,
            "data_sha256": digest_of([*split.train, *split.held_out]),
            "train_rows": len(split.train),
            "held_out_rows": len(split.held_out),
            "replay_share": round(data.survey.replay_share, 4),
            "config": _portable(config),
            "versions": {library: metadata.version(library) for library in LIBRARIES},
        },
        "scores": _scores(verdict),
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _scores(verdict: Verdict) -> dict[str, float]:
    measured = {
        "held_out_loss": verdict.held_out_adapter,
        "held_out_loss_base": verdict.held_out_base,
        "general_loss": verdict.general_adapter,
        "general_loss_base": verdict.general_base,
    }
    return {name: round(loss, 6) for name, loss in measured.items() if loss is not None}


def _portable(config: TrainConfig) -> dict[str, Any]:
    """Paths shrink to their last part: an adapter travels, the directories of the machine it was made on do not."""
    values: dict[str, Any] = with_files(config, lambda file: Path(file.name)).model_dump(mode="json")
    values["model"]["model_name_or_path"] = config.model.model_name_or_path.resolve().name
    if config.model.adapter_name_or_path is not None:
        values["model"]["adapter_name_or_path"] = config.model.adapter_name_or_path.resolve().name
    values["output"]["output_dir"] = config.output.output_dir.name
    return values
