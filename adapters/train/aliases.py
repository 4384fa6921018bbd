"""Keys as other trainers call them → our own: taken, or left out, with a warning that says why.

Older transformers, peft scripts, axolotl and LLaMA-Factory spell the same settings in other words, and flat. It knows
nothing of files; `config.py` asks it about every key that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from adapters.errors import ConfigError

ALIASES: Mapping[str, str] = {
    "base_model": "model.model_name_or_path",
    "model_name": "model.model_name_or_path",
    "torch_dtype": "model.dtype",
    "bnb_4bit_double_quant": "quantization.bnb_4bit_use_double_quant",
    "double_quant": "quantization.bnb_4bit_use_double_quant",
    "adapter": "peft.method",
    "lora_r": "peft.r",
    "lora_rank": "peft.r",
    "lora_target": "peft.target_modules",
    "lora_target_modules": "peft.target_modules",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "val_set_size": "data.eval_split",
    "val_size": "data.eval_split",
    "micro_batch_size": "training.per_device_train_batch_size",
    "batch_size": "training.per_device_train_batch_size",
    "grad_accumulation_steps": "training.gradient_accumulation_steps",
    "lr": "training.learning_rate",
    "warmup_ratio": "training.warmup_steps",
    "num_epochs": "training.num_train_epochs",
    "optimizer": "training.optim",
    "lr_scheduler": "training.lr_scheduler_type",
}
LEFT_OUT: Mapping[str, str] = {
    "logging_dir": "the log lies in output.output_dir, and output.report_to sends it elsewhere",
    "logging_steps": "every step is logged",
    "logging_strategy": "every step is logged",
    "evaluation_strategy": "eval.eval_steps says when",
    "eval_strategy": "eval.eval_steps says when",
    "save_strategy": "output.save_steps says when",
    "load_best_model_at_end": "the weights with the lowest held-out loss are what is saved",
    "save_safetensors": "nothing else is written",
    "overwrite_output_dir": "an older result is replaced when a run has ended well",
    "group_by_length": "data.packing saves the padding of short rows",
    "fp16": "model.dtype says in what is computed, bfloat16 or float32",
}
"""Words of transformers that say nothing here, and why they need not be said."""


def own(values: Mapping[str, Any], known: frozenset[str]) -> tuple[dict[str, Any], list[str]]:
    """A configuration in our words, and what to warn of. Raises ConfigError where two words say the same key."""
    found: dict[str, Any] = {}
    warnings = []
    for key, value in _leaves(values, known):
        if needless := left_out(key, known):
            warnings.append(needless)
            continue
        target, translated, warning = own_key(key, value, known)
        *sections, last = target.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        if last in place:
            raise ConfigError(f"{key}: it is {target} here, which is given, too; leave one of them out")
        place[last] = translated
        warnings += [warning] if warning else []
    return found, warnings


def _leaves(values: Mapping[str, Any], known: frozenset[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Sections are gone into, whatever else holds keys of its own is a value. Our own words first."""
    for key, value in sorted(values.items(), key=lambda item: prefix + str(item[0]) not in known):
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and any(each.startswith(f"{name}.") for each in known):
            yield from _leaves(value, known, f"{name}.")
        else:
            yield name, value


def left_out(key: str, known: frozenset[str]) -> str | None:
    """What to warn of where a key says nothing here."""
    reason = None if key in known else LEFT_OUT.get(key.rpartition(".")[2])
    return f"{key} is left out: {reason}" if reason else None


def own_key(key: str, value: Any, known: frozenset[str]) -> tuple[str, Any, str | None]:
    """(our key, its value, what to warn of). What is neither ours nor an alias comes back as it is.

    A key that is ours but stands in no section is an alias of itself.
    """
    last = key.rpartition(".")[2]
    if key in known:
        return key, value, None
    target = ALIASES.get(last) or (_only_one(last, known) if last == key else None)
    if target is None or target not in known:
        return key, value, None
    translate = VALUES.get(last, _same)
    translated = translate(key, value)
    return target, translated, f"{key} is {target} here; taken as {target}={translated}"


def _only_one(last: str, known: frozenset[str]) -> str | None:
    """`learning_rate` outside of its section; a name that two sections have is not guessed."""
    found = [each for each in known if each.rpartition(".")[2] == last and "." in each]
    return found[0] if len(found) == 1 else None


def _same(key: str, value: Any) -> Any:
    return value


def _share(key: str, value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and not 0 <= value < 1:
        raise ConfigError(f"{key}={value}: expected a share between 0 and 1, not a number of rows or steps")
    return value


def _targets(key: str, value: Any) -> Any:
    return {"all": "all-linear", "all-linear": "all-linear"}.get(value, value) if isinstance(value, str) else value


def _dtype(key: str, value: Any) -> Any:
    names = {"bf16": "bfloat16", "torch.bfloat16": "bfloat16", "fp32": "float32", "torch.float32": "float32"}
    return names.get(value, value) if isinstance(value, str) else value


VALUES: Mapping[str, Callable[[str, Any], Any]] = {
    "warmup_ratio": _share,
    "val_set_size": _share,
    "val_size": _share,
    "lora_target": _targets,
    "lora_target_modules": _targets,
    "torch_dtype": _dtype,
}
"""Where the values are other ones, too."""
