"""adapter_config.json as PEFT reads it: rank and scaling of every module, and what the engine would not serve.

The engine ignores fields it does not know and would compute something else without a word, so
every option of PEFT 0.21 is either known to change nothing here or refused. It does not look at weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.json_document import read_document
from adapters.refusals import refuse

BIASES = ("none", "all", "lora_only")
CONVERTED_OPTIONS = {"use_dora": "dora", "lora_bias": "lora_bias", "modules_to_save": "modules_to_save"}
"""What adapters/convert takes away where it can."""
REFUSED_OPTIONS = {
    "alora_invocation_tokens": "alora",
    "layer_replication": "layer_replication",
    "trainable_token_indices": "trainable_tokens",
    "target_parameters": "target_parameters",
    "use_bdlora": "unsupported_variant",
    "use_qalora": "unsupported_variant",
    "arrow_config": "unsupported_variant",
    "kasa_config": "unsupported_variant",
    "monteclora_config": "unsupported_variant",
}
PROMPTING = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT")
ALL_OPTIONS = {**CONVERTED_OPTIONS, **REFUSED_OPTIONS}
HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
# fmt: off
HARMLESS_OPTIONS = frozenset((
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type",
    "use_rslora", "velora_config",
))
# fmt: on
PATTERN_CHARACTERS = re.compile(r"[\w.\\^$|()\[\]*+?{},-]{1,512}", re.ASCII)
EXPLOSIVE = re.compile(r"\)[*+?{]|[*+?{}][*+?{]|\(\?|\\[0-9]")
"""A repeated group, a repeated repeat, an extension, a back-reference."""
MAX_PATTERN_REPEATS = 2
MAX_REPEATING_PATTERNS = 64
MAX_PATTERN_WORK = 100_000
"""Patterns are regular expressions from strangers: these bounds keep matching polynomial and short."""
MAX_BASE_NAME = 1024

Patterns = Sequence[tuple[re.Pattern[str], float]]


@dataclass(frozen=True)
class Scaling:
    """Rank and scaling of every module, as PEFT reads them."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Patterns
    alpha_pattern: Patterns

    def rank_of(self, module: str) -> int:
        return int(_first_match(self.rank_pattern, module, self.rank))

    def scaling_of(self, module: str) -> float:
        rank = self.rank_of(module)
        return _first_match(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def largest_rank(self) -> int:
        return max([self.rank, *(int(rank) for _, rank in self.rank_pattern)])


@dataclass(frozen=True)
class LoraConfig(Scaling):
    """What the configuration says about every module."""

    target_modules: tuple[str, ...] | str
    base_model: str
    warnings: tuple[str, ...]

    def targets(self, module: str) -> bool:
        """Whether PEFT would attach the adapter here; a regular expression is not tried."""
        if isinstance(self.target_modules, str):
            return True
        return any(module == target or module.endswith(f".{target}") for target in self.target_modules)


def read_config(path: Path, max_rank: int) -> LoraConfig:
    """Raises InvalidAdapter for everything the engine would refuse, ignore or compute differently."""
    raw = read_document(path)
    require_known(raw, (*CONVERTED_OPTIONS, *REFUSED_OPTIONS))
    if raw.get("bias", "none") != "none":
        raise refuse("lora_bias", f"bias is {_shown(raw['bias'])}, expected 'none'")
    if (init := modified_base(raw)) is not None:
        raise refuse("modified_base", f"init_lora_weights is {_shown(init)}")
    scaling = read_scaling(raw, "lora_alpha")
    if scaling.largest_rank > max_rank:
        raise refuse("rank_too_large", f"rank {scaling.largest_rank}, this server takes at most {max_rank}")
    return LoraConfig(
        **vars(scaling),
        target_modules=_target_modules(raw.get("target_modules")),
        base_model=read_base_model(raw),
        warnings=_unknown_options(raw),
    )


def read_scaling(raw: Mapping[str, Any], alpha: str) -> Scaling:
    """`alpha`: the name of the field; `lora_alpha` for LoRA, `alpha` for LoHa and LoKr."""
    return Scaling(
        rank=_rank(raw.get("r"), "r"),
        alpha=_alpha(raw.get(alpha), alpha),
        use_rslora=_flag(raw, "use_rslora"),
        rank_pattern=_patterns(raw, "rank_pattern", _rank),
        alpha_pattern=_patterns(raw, "alpha_pattern", _alpha),
    )


def require_known(raw: Mapping[str, Any], options: Collection[str] = tuple(REFUSED_OPTIONS)) -> None:
    """Raises InvalidAdapter for another kind than LoRA, and where one of these options is set."""
    peft_type = raw.get("peft_type", "LORA")
    if not isinstance(peft_type, str) or peft_type.upper() != "LORA":
        prompting = isinstance(peft_type, str) and peft_type.upper() in PROMPTING
        raise refuse("changes_prompt" if prompting else "not_lora", f"peft_type is {_shown(peft_type)}")
    for option, code in ALL_OPTIONS.items():
        if option in options and raw.get(option):
            raise refuse(code, f"{option} is {_shown(raw[option])}")


def require_types(raw: Mapping[str, Any]) -> None:
    """Of what adapters/convert takes away: nobody looks at it again."""
    if raw.get("bias", "none") not in BIASES:
        raise refuse("bad_config", f"bias is {_shown(raw['bias'])}, expected one of {', '.join(BIASES)}")
    for option in ("use_dora", "lora_bias"):
        _flag(raw, option)
    saved = raw.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise refuse("bad_config", f"modules_to_save is {_shown(saved)}, expected names")
    read_base_model(raw)


def modified_base(raw: Mapping[str, Any]) -> str | None:
    """The initialisation, in lower case, where it is one that changed the base's weights, too."""
    init = raw.get("init_lora_weights")
    return init.lower() if isinstance(init, str) and init.lower() not in HARMLESS_INITS else None


def _rank(value: Any, field: str) -> int:
    if type(value) is not int or not 1 <= value < 1 << 20:
        raise refuse("bad_config", f"{field} is {_shown(value)}, expected a whole number of at least 1")
    return value


def _alpha(value: Any, field: str) -> float:
    if type(value) not in (int, float):
        raise refuse("bad_config", f"{field} is {_shown(value)}, expected a number")
    if not abs(value) <= 1e9:
        raise refuse("bad_scaling", f"{field} is {_shown(value)}, expected at most 1e9")
    return float(value)


def _flag(raw: Mapping[str, Any], field: str) -> bool:
    value = raw.get(field)
    if value is not None and not isinstance(value, bool):
        raise refuse("bad_config", f"{field} is {_shown(value)}, expected true or false")
    return bool(value)


def read_base_model(raw: Mapping[str, Any]) -> str:
    value = raw.get("base_model_name_or_path")
    if value is not None and not (isinstance(value, str) and len(value) <= MAX_BASE_NAME and value.isprintable()):
        field = "base_model_name_or_path"
        raise refuse("bad_config", f"{field} is {_shown(value)}, expected at most {MAX_BASE_NAME} printable characters")
    return value or ""


def _target_modules(value: Any) -> tuple[str, ...] | str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise refuse("bad_config", f"target_modules is {_shown(value)}, expected names or a regular expression")
    return tuple(value)


def _patterns(raw: Mapping[str, Any], field: str, check: Any) -> Patterns:
    """PEFT's rule (`get_pattern_key`): a key is a regular expression for the end of the module's name."""
    value = raw.get(field) or {}
    if not isinstance(value, dict):
        raise refuse("bad_config", f"{field} is {_shown(value)}, expected an object")
    if sum(map(_repeats, value)) > MAX_REPEATING_PATTERNS:
        raise refuse("unsupported_pattern", f"{field} has more than {MAX_REPEATING_PATTERNS} repeating patterns")
    if sum(map(_work, value)) > MAX_PATTERN_WORK:
        raise refuse("unsupported_pattern", f"{field} has {len(value)} patterns, too many or with too many choices")
    return [(_compile(key, field), check(item, f"{field}[{key!r}]")) for key, item in value.items()]


def _repeats(key: str) -> int:
    return len(re.findall(r"[*+?{]", key))


def _work(key: str) -> int:
    """In how many ways it may match a name, about: choices multiply from group to group, and with repeats."""
    groups = min(max(key.count("("), 1), 16)
    return int((1 + key.count("|")) ** groups * 40 ** _repeats(key)) + 25


def _compile(key: str, field: str) -> re.Pattern[str]:
    if not PATTERN_CHARACTERS.fullmatch(key) or EXPLOSIVE.search(key) or _repeats(key) > MAX_PATTERN_REPEATS:
        raise refuse("unsupported_pattern", f"{field} has the pattern {_shown(key)}")
    try:
        return re.compile(rf"(?:.*\.)?(?:{key})$")
    except (re.error, OverflowError) as error:
        raise refuse("unsupported_pattern", f"{field} has the pattern {_shown(key)}: {error}") from error


def _first_match(patterns: Patterns, module: str, otherwise: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), otherwise)


def _unknown_options(raw: Mapping[str, Any]) -> tuple[str, ...]:
    unknown = sorted(
        key for key, value in raw.items() if value and key not in HARMLESS_OPTIONS and key not in ALL_OPTIONS
    )
    if not unknown:
        return ()
    return (f"adapter_config.json sets options that are not known here and have no effect: {', '.join(unknown)[:300]}",)


def _shown(value: Any) -> str:
    return repr(value)[:120]
