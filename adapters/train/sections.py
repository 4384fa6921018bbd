"""The sections of a training configuration, a field a key of the YAML file; `config.py` reads them.

What is trained stands in `method_sections.py`. Names are those of peft and transformers. It knows nothing of torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from annotated_types import MinLen
from pydantic import BaseModel, ConfigDict, Field, model_validator

from adapters.names import NAME


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)


class ModelSection(Section):
    model_name_or_path: Path
    """Directory of the base in Hugging Face form, relative to where the command runs."""
    adapter_name_or_path: Path | None = None
    """A PEFT directory with a plain LoRA, of the rank and modules that `peft` says: it is trained further."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute type, and storage type of everything that is not quantised. `auto` is bfloat16 where the processor has
    instructions for it, else float32: emulated bfloat16 made a step of 2 s take 50 s."""


class QuantizationSection(Section):
    """Defaults equal what the server does in flight, so that an adapter is trained on what it will be served on."""

    load_in_4bit: bool = True
    """The linear modules in 4 bits. On a CPU a small base takes no less memory for it, see `train estimate`."""
    bnb_4bit_quant_type: Literal["nf4"] = "nf4"
    """The only 4-bit type that is served."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the scales as well: 4.127 bits a weight instead of 4.5."""
    bnb_4bit_compute_dtype: Literal["bfloat16", "float32"] | None = None
    """By default `model.dtype`."""


class DataFile(Section):
    """A path alone means `{path: …}`."""

    path: Path
    """JSONL, or one array in a .json file; relative to the YAML file."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text"] = "auto"
    """`auto`: the first row decides for its file."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str | Path) else value


class TrainFile(DataFile):
    weight: float = Field(default=1.0, gt=0, le=100)
    """How often its rows are seen in an epoch: 2 is twice; 0.5 is half of its rows, chosen by hash."""


class ReplayFile(DataFile):
    """General data mixed in, so that what the base could do is not forgotten; 5 to 10 % is usual."""

    ratio: float = Field(default=0.07, gt=0, le=0.5)
    """Its share of the tokens of an epoch."""


class GatesSection(Section):
    """What is wrong with the data stops a run before any weight is loaded, row by row; what to let through."""

    untrained: Literal["refuse", "drop"] = "refuse"
    """Rows without a token to train, as where `max_length` cuts the whole answer off."""
    unended: Literal["refuse", "allow"] = "refuse"
    """Data in which no end of an answer is trained: the model would never learn to stop."""
    empty_answers: Literal["refuse", "allow"] = "refuse"
    """Answers without a character; `allow` teaches to end at once."""
    leakage: Literal["refuse", "drop", "allow"] = "refuse"
    """Held-out rows that are trained, word for word or but for case, spaces and punctuation; `drop` trains without
    them."""
    max_truncated: float = Field(default=0.1, ge=0, le=1)
    """Share of the rows that `max_length` may cut."""
    max_duplicates: float = Field(default=0.1, ge=0, le=1)
    """Share of the rows that may be copies of others; they are left out. To see rows more often, use `weight`."""
    max_row_tokens: int | None = Field(default=None, ge=1)
    """Longer rows look like broken data; by default 16 times `max_length`. Texts are free."""


class DataSection(Section):
    train: Annotated[tuple[TrainFile, ...], MinLen(1)]
    """Files of rows: `[a.jsonl, {path: b.jsonl, weight: 2}]`."""
    eval: DataFile | None = None
    """Held-out rows in a file of their own; without it `eval_split` takes them from `train`."""
    eval_split: float = Field(default=0.1, gt=0, lt=1)
    """Share of the conversations held out, chosen by the hash of the conversation before anything else is done."""
    max_length: int = Field(default=512, ge=16)
    """Tokens; a longer conversation is cut at its end, a longer text is cut into pieces."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Whose words are learnt: every answer, the last answer, or all that is said. Of a prompt and its completion,
    `assistant` and `last` are the completion; a text is learnt whole."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a row that cannot be read."""
    max_skipped: int = Field(default=100, ge=0)
    """With `on_error: skip`: more wrong rows than this stop the run all the same."""
    packing: bool = False
    """Several rows in one sequence of up to `max_length`, none of which sees another; saves padding of short rows."""
    replay: ReplayFile | None = None
    """A file of general data."""
    gates: GatesSection = GatesSection()
    """Which faults of the data to let through."""

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> Self:
        if self.eval is not None and "eval_split" in self.model_fields_set:
            raise ValueError("eval and eval_split exclude each other: rows are held out in a file, or split off")
        return self


class TrainingSection(Section):
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; counts instead of `num_train_epochs` where it is given."""
    num_train_epochs: float = Field(default=3, gt=0)
    """Passes over the training data."""
    per_device_train_batch_size: int = Field(default=8, ge=1)
    """Rows computed at once; activations grow with it."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Batches that make one step: a larger batch for the time of several, in the memory of one."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """The highest one. 1e-4 to 5e-4 is usual for a LoRA, ten times that of full fine-tuning."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up; a cosine and a line end at a tenth of the learning rate."""
    warmup_steps: float = Field(default=3, ge=0)
    """Linear warm-up; below 1 it is a share of the run, as 0.03."""
    optim: Literal["auto", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "lion_8bit"] = "auto"
    """`auto` is adamw_torch, on a GPU with a 4-bit base paged_adamw_8bit. 8 bits save three quarters of the optimizer's
    memory, which is little beside a LoRA, and cost a CPU several times its time. Lion wants a tenth of the rate."""
    gradient_checkpointing: bool = False
    """Computes each layer twice and keeps its activations once: about a quarter slower, far less memory."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Longer gradients are cut to this length."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Pulls the adapter towards changing nothing."""
    seed: int = 42
    """Of the order of rows, of the first weights and of dropout."""


class EvalSection(Section):
    eval_steps: Literal["auto", "never"] | Annotated[int, Field(ge=1)] = "auto"
    """Steps between two looks at the held-out loss, during training. `auto` looks 4 to 20 times. The weights with the
    lowest loss are what is saved."""
    early_stopping_patience: int | None = Field(default=3, ge=1)
    """Stop after so many looks in a row that found no lower loss; null never does."""
    general_set: DataFile | None = None
    """Rows of general data on which base and adapter are compared: the difference is what was forgotten. Without it,
    `eval_split` of `data.replay`."""
    prompts: tuple[str, ...] = ()
    """Asked before and after training, greedily; keep them out of the data."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Length of the answers to `prompts`; they take time."""


class OutputSection(Section):
    output_dir: Path
    """Becomes the PEFT directory; an older one is replaced when the run has ended well."""
    name: str = Field(pattern=rf"^{NAME.pattern}$")
    """What the adapter is called where it is served."""
    max_lora_rank: int = Field(default=16, ge=1)
    """The largest rank the server takes (its `max_lora_rank`); the finished adapter is checked against it."""
    max_error: float = Field(default=0.0, ge=0, le=1)
    """What share of its change of the weights may be lost where it is no LoRA of that rank, as DoRA."""
    description: str = ""
    """For people, in the model card and the registry."""
    save_steps: Literal["auto", "never"] | Annotated[int, Field(ge=1)] = "auto"
    """Steps between two checkpoints. `auto` makes 4 to 20."""
    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints kept while the run goes on; when it has ended well they are removed."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the last whole checkpoint of an earlier, unfinished run; `never` starts anew."""
    report_to: tuple[Literal["jsonl", "tensorboard", "mlflow"], ...] = ("jsonl",)
    """Where losses go beside log.jsonl, which is always written: tensorboard writes `<output_dir>.tensorboard`, mlflow
    goes by MLFLOW_TRACKING_URI. Both have to be installed for it."""
