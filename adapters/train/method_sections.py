"""What is trained, as the YAML file says it: the method and its sizes, and which of them cannot go together.

Field names are those of peft. A key that the method would not look at is an error, never ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from adapters.train.sections import DataSection, ModelSection, QuantizationSection, Section, TrainingSection

Method = Literal["lora", "qlora", "adalora", "ia3", "prompt", "prefix"]
TARGET_PRESETS: Mapping[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "attention-qv": ("q_proj", "v_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
SMALLEST_SCHEDULE = 10
"""Steps below which AdaLoRA has no room to warm up, to prune and to settle."""
PROMPTING = ("prompt", "prefix")
LORA_KEYS = frozenset(
    ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights")
)
KEYS: Mapping[str, frozenset[str]] = {
    "lora": LORA_KEYS | {"target_modules"},
    "qlora": LORA_KEYS | {"target_modules"},
    "adalora": frozenset(("lora_alpha", "lora_dropout", "target_modules", "adalora")),
    "ia3": frozenset(("target_modules",)),
    "prompt": frozenset(("num_virtual_tokens",)),
    "prefix": frozenset(("num_virtual_tokens",)),
}
"""Which keys of the section a method looks at."""


class AdaLoraSection(Section):
    init_r: int = Field(default=12, ge=2, le=512)
    """Rank of every module at the start."""
    target_r: int = Field(default=8, ge=1, le=511)
    """Rank of a module at the end, on average over all of them."""
    tinit: Literal["auto"] | int = "auto"
    """Steps before the first rank goes; `auto` is a tenth of the run."""
    tfinal: Literal["auto"] | int = "auto"
    """Steps after the last one went; `auto` is three tenths."""
    deltaT: Literal["auto"] | int = "auto"  # noqa: N815  as peft calls it
    """Steps between two reallocations; `auto` makes about ten of them."""
    beta1: float = Field(default=0.85, gt=0, lt=1)
    beta2: float = Field(default=0.85, gt=0, lt=1)
    orth_reg_weight: float = Field(default=0.5, ge=0)

    @model_validator(mode="after")
    def _has_something_to_take_away(self) -> AdaLoraSection:
        if self.init_r <= self.target_r:
            raise ValueError(f"init_r must be more than target_r, got {self.init_r} and {self.target_r}")
        return self

    def schedule(self, steps: int) -> tuple[int, int, int]:
        """tinit, tfinal and deltaT of a run of `steps`. Raises ValueError where they leave nothing between."""
        tinit = round(0.1 * steps) if self.tinit == "auto" else self.tinit
        tfinal = round(0.3 * steps) if self.tfinal == "auto" else self.tfinal
        between = steps - tinit - tfinal
        if steps < SMALLEST_SCHEDULE or min(tinit, tfinal) < 0 or between < 2:
            raise ValueError(
                f"AdaLoRA takes ranks away between step tinit={tinit} and step {steps - tfinal} of {steps}; expected "
                f"at least {SMALLEST_SCHEDULE} steps (training.max_steps) and two of them between"
            )
        delta = max(1, between // 10) if self.deltaT == "auto" else self.deltaT
        if delta < 1:
            raise ValueError(f"deltaT must be at least 1, got {delta}")
        return tinit, tfinal, delta


class PeftSection(Section):
    method: Method = "lora"
    """`qlora` is `lora` that insists on a base in NF4. IA³ can only be merged, prompt and prefix tuning not even that:
    such a run ends with exit code 6."""
    r: Literal["auto"] | Annotated[int, Field(ge=1, le=512)] = 8
    """`auto` goes by the base's size: 8 below 7 B parameters, 16 below 30 B, else 32."""
    lora_alpha: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """`auto` is 2·r; with rsLoRA 16, whatever the rank; with AdaLoRA 2·init_r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["attention", "attention-qv", "mlp", "all-linear"] | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    """Scale by alpha/√r instead of alpha/r."""
    use_dora: bool = False
    """Learn the norm of every row apart. No LoRA is exactly that: it is merged, or served with `output.max_error`."""
    rank_pattern: Mapping[str, Annotated[int, Field(ge=1, le=512)]] = {}
    """End of a module's name → its rank, where it is another than `r`."""
    alpha_pattern: Mapping[str, Annotated[int, Field(ge=1)]] = {}
    init_lora_weights: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "loftq"] = "default"
    """pissa and olora begin with a part of the base's weights and need them in float32; served, their rank doubles.
    loftq begins with what NF4 lost of them."""
    adalora: AdaLoraSection = AdaLoraSection()
    num_virtual_tokens: int = Field(default=20, ge=1)

    @model_validator(mode="after")
    def _has_no_key_that_is_not_looked_at(self) -> PeftSection:
        idle = self.model_fields_set - KEYS[self.method] - {"method"}
        changed = sorted(key for key in idle if getattr(self, key) != type(self).model_fields[key].default)
        if changed:
            known = ", ".join(sorted(KEYS[self.method]))
            raise ValueError(f"method {self.method} does not look at {', '.join(changed)}; it knows {known}")
        return self

    def modules_for_peft(self) -> list[str] | str:
        """peft finds `all-linear` itself in any architecture, leaving out the lm_head."""
        if isinstance(self.target_modules, str):
            return list(TARGET_PRESETS.get(self.target_modules, ())) or self.target_modules
        return list(self.target_modules)

    def rank(self, parameters: int) -> int:
        """For a base of so many parameters; 0 where the method has none."""
        if self.method == "adalora":
            return self.adalora.init_r
        if self.method not in ("lora", "qlora"):
            return 0
        return self.r if self.r != "auto" else 8 if parameters < 7e9 else 16 if parameters < 30e9 else 32

    def alpha(self, parameters: int) -> int:
        if self.lora_alpha != "auto":
            return self.lora_alpha
        return 16 if self.use_rslora else 2 * self.rank(parameters)

    @property
    def foreseen(self) -> str | None:
        """Why the result cannot be served beside the base, where that is known before the run."""
        if self.method == "ia3":
            return "IA³ scales the weights, which no sum of a low rank does: it can only be merged into the base"
        if self.method in PROMPTING:
            return f"{self.method} tuning puts vectors before the prompt: it can be neither served by name nor merged"
        return None

    def resolved(self, parameters: int) -> PeftSection:
        """With numbers instead of `auto`."""
        update: dict[str, int] = {}
        if self.method in ("lora", "qlora"):
            update["r"] = self.rank(parameters)
        if self.rank(parameters):
            update["lora_alpha"] = self.alpha(parameters)
        return self.model_copy(update=update)


def impossible(
    model: ModelSection,
    quantization: QuantizationSection,
    peft: PeftSection,
    training: TrainingSection,
    data: DataSection,
) -> Iterator[str]:
    """What cannot go together, and what to do instead."""
    init = peft.init_lora_weights
    if peft.method == "qlora" and not quantization.load_in_4bit:
        yield "peft.method=qlora needs quantization.load_in_4bit=true; on a base that is not quantised it is `lora`"
    if init in ("pissa", "olora"):
        if quantization.load_in_4bit:
            yield (
                f"peft.init_lora_weights={init} takes a part out of the base's weights, and the rest put into NF4 "
                "again would be another base than the one that is served; set quantization.load_in_4bit=false or use "
                "loftq"
            )
        elif model.dtype != "float32":
            yield (
                f"peft.init_lora_weights={init} takes a part out of the base's weights, and the rest would be rounded, "
                f"which no adapter can undo; set model.dtype=float32, got {model.dtype}"
            )
    if init in ("pissa", "olora") and model.adapter_name_or_path is not None:
        yield f"model.adapter_name_or_path goes on from an adapter, and peft.init_lora_weights={init} would begin anew"
    if init == "loftq" and not quantization.load_in_4bit:
        yield "peft.init_lora_weights=loftq begins with what NF4 lost; it needs quantization.load_in_4bit=true"
    if peft.use_dora and quantization.load_in_4bit:
        yield (
            "peft.use_dora=true learns the norms of the base's rows, and NF4 has other rows than the checkpoint from "
            "which its change of the weights is computed afterwards; set quantization.load_in_4bit=false"
        )
    if peft.use_dora and init not in ("default", "gaussian"):
        yield f"peft.use_dora=true goes with the default initialisation or gaussian, not with {init}"
    if peft.method in PROMPTING and data.packing:
        yield f"peft.method={peft.method} puts vectors before a sequence, and with data.packing several rows share one"
    if peft.method == "prefix" and training.gradient_checkpointing:
        yield "peft.method=prefix lives in the cache that training.gradient_checkpointing switches off; leave out one"
    ranks = [rank for rank in (peft.r, *peft.rank_pattern.values()) if rank != "auto"]
    if init == "orthogonal" and any(rank % 2 for rank in ranks):
        yield f"peft.init_lora_weights=orthogonal needs even ranks, got {', '.join(map(str, ranks))}"
