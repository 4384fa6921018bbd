"""Settings → vLLM's own arguments and process environment. The only place that knows vLLM's flag names."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NoReturn

from server.errors import SettingsError
from server.settings import Settings
from server.vllm_plugin.step_threads import SHORT_STEP_THREADS, physical_cores

GIB = 1 << 30
# Compact JSON: a small model that may write any whitespace writes nothing else. Only a named backend can promise it,
# and only xgrammar knows the grammar of strict tool calls.
STRUCTURED_OUTPUTS = '{"backend": "xgrammar", "disable_any_whitespace": true}'


def prepare_environment(settings: Settings) -> None:
    """Set what vLLM reads from the environment, before it is imported and before it spawns its processes.

    Raises SettingsError for what cannot work on this machine.
    """
    defaults = {
        "VLLM_COMPUTE_NANS_IN_LOGITS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if Path(settings.model).exists() or settings.model == "demo":
        defaults["HF_HUB_OFFLINE"] = "1"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if settings.device == "cpu":
        _prepare_cpu(settings)


def _prepare_cpu(settings: Settings) -> None:
    """One process schedules and computes. vLLM starts a second one that computes, because the OpenMP environment must
    be there before a process begins; here it is, and each step is spared the way from one to the other and back."""
    if settings.compiles:
        _require_what_compiles()
    os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")  # what it keeps of a compilation it never finds again on a CPU
    for name in ("TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR"):
        os.environ.setdefault(name, str(settings.data_dir.absolute() / "compiled"))
    if not settings.is_distributed:
        cores = physical_cores()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["OMP_NUM_THREADS"] = str(cores)
        os.environ[SHORT_STEP_THREADS] = str(settings.cpu_threads or max(1, cores - 1))


def _require_what_compiles() -> None:
    from adapters.processor import multiplies_bf16

    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise SettingsError(
            f"compile is set, but there is no C++ compiler ({compiler}) on the path: install one, name it in CXX, or "
            "serve without --compile"
        )
    if not multiplies_bf16():
        raise SettingsError(
            "compile is set, but this processor has no bf16 instructions (AVX512-BF16, AMX): there a compiled model "
            "answered NaN; serve without --compile"
        )


def command_line(settings: Settings, model: Path, name: str, targets: Collection[str]) -> list[str]:
    """What `vllm serve` would get. `targets`: last name parts of the linear modules that adapters may change."""
    return [*served(settings, model, name, targets), *execution(settings), *settings.engine_args]


def merged_command_line(settings: Settings, merged: Path, name: str, memory_share: float | None) -> list[str]:
    """The same for an engine of merged weights: no LoRA, and memory as it was planned. `name` is its label in metrics.

    `memory_share` of a GPU, which vLLM wants to find free.
    """
    flags = _limits(settings) | {
        "--model": str(merged),
        "--served-model-name": name,
        "--quantization": "bitsandbytes" if is_quantised(merged) else None,
        "--max-num-seqs": settings.sequences,
        "--kv-cache-memory-bytes": settings.merged_kv_cache_bytes,
        "--gpu-memory-utilization": memory_share,
    }
    return [*_words(flags), "--enable-auto-tool-choice", *_computing(settings), *settings.engine_args]


def is_quantised(model: Path) -> bool:
    config = json.loads((model / "config.json").read_text())
    return "quantization_config" in config


def served(settings: Settings, model: Path, name: str, targets: Collection[str]) -> list[str]:
    """What is served and within which limits; what vLLM's own server is given to be compared with ours.

    The engine keeps one adapter more than may be resident: the spare place in which the next one is loaded, so that
    a bad one never pushes out a good one and the engine's own LRU never evicts.
    """
    flags = _limits(settings) | {
        "--model": str(model),
        "--served-model-name": name,
        "--max-loras": settings.slots,
        "--max-cpu-loras": settings.resident_adapters + 1,
        "--max-lora-rank": settings.max_lora_rank,
        "--quantization": "bitsandbytes" if settings.quantization == "nf4" else None,
        "--max-num-seqs": settings.sequences,
        "--kv-cache-memory-bytes": settings.kv_cache_memory_bytes or (GIB if settings.device == "cpu" else None),
        "--gpu-memory-utilization": settings.gpu_memory_utilization if settings.device == "cuda" else None,
    }
    return [*_words(flags), "--enable-lora", "--enable-auto-tool-choice", "--lora-target-modules", *sorted(targets)]


def _limits(settings: Settings) -> dict[str, object]:
    """What every engine of a server has in common."""
    return {
        "--dtype": settings.dtype,
        "--tool-call-parser": settings.tool_call_parser,
        "--tool-strict-level": "parameter",
        "--structured-outputs-config": STRUCTURED_OUTPUTS,
        "--shutdown-timeout": settings.shutdown_timeout_s,
        "--max-model-len": settings.max_model_len or (2048 if settings.device == "cpu" else None),
    }


def _words(flags: Mapping[str, object]) -> list[str]:
    return [str(part) for flag, value in flags.items() if value is not None for part in (flag, value)]


def execution(settings: Settings) -> list[str]:
    """How the base engine computes."""
    argv = _computing(settings)
    if settings.rotates:
        ours = {"adapter_turn_s": settings.adapter_turn_s, "sequences": settings.sequences}
        argv += ["--scheduler-cls", "server.vllm_plugin.scheduler.RotatingScheduler"]
        argv += ["--additional-config", json.dumps(ours)]
        argv += ["--max-num-seqs", str(settings.sequences + settings.spare_sequences)]
    return argv


def _computing(settings: Settings) -> list[str]:
    argv = [] if settings.compiles else ["--enforce-eager"]
    if settings.device == "cpu" and not settings.compiles:
        argv += ["--compilation-config", '{"custom_ops": ["all"]}']  # vLLM's kernels where it has some
    if settings.device == "cpu" and not settings.is_distributed:
        argv += ["--distributed-executor-backend", "uni"]
    return argv


def parse(argv: list[str]) -> Namespace:
    """Let vLLM's own parser fill in every other argument of its serving objects. Raises SettingsError."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def refuse(message: str) -> NoReturn:  # argparse would print its usage and end the process
        raise SettingsError(f"vLLM refuses its arguments: {message}; correct engine_args")

    parser = make_arg_parser(FlexibleArgumentParser())
    parser.error = refuse
    arguments: Namespace = parser.parse_args(argv)
    validate_parsed_serve_args(arguments)
    return arguments
