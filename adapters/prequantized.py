"""The base in NF4 on disk, made once: an engine that loads it need not quantise the whole model at every start.

Made shard by shard by bitsandbytes' own `quantize_4bit` with double-quantised scales, which is what the engine's
loader does in memory, so both hold the same bits. The result is a Hugging Face directory of its own in the layout that
transformers writes; the base it was made from stays the identity that adapters are checked against. Knows no engine.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track

from adapters.base import CONFIG, INDEX, PACKED_STATE, SINGLE, WEIGHT, BaseModel, shards_of
from adapters.safetensors_header import read_header
from adapters.staging import staged

if TYPE_CHECKING:
    import torch

LAYOUT = "nf4-double-1"
"""Changes when other bits would be written: a directory of another layout is left alone, and made anew."""


def place(base: BaseModel, cache_dir: Path) -> Path:
    """Where `base` in NF4 lies, or would lie, in `cache_dir`."""
    return cache_dir / f"{base.fingerprint.removeprefix('sha256:')[:16]}-{LAYOUT}"


def is_there(place: Path) -> bool:
    return (place / CONFIG).is_file()  # directories appear whole


def prequantize(base: BaseModel, destination: Path, *, quiet: bool = False) -> None:
    """Write the linear layers of `base` in NF4 and all else as it is. Raises OSError. `quiet`: without a bar.

    Ask `can_be_prequantized` first. In a process of its own (`python -m adapters.prequantized`) it leaves no memory
    behind: the largest shard and what it becomes are held at once.
    """
    with staged(destination) as staging:
        _copy_small_files(base.path, staging)
        _quantise_shards(base, staging, quiet)
        _write_config(base.path, staging)


def can_be_prequantized(base: BaseModel) -> bool:
    """Not where it is quantised already, nor where weights of three dimensions (fused experts) would be left."""
    config = json.loads((base.path / CONFIG).read_text())
    return "quantization_config" not in config and all(
        len(span.shape) <= 2 and PACKED_STATE not in name
        for shard in shards_of(base.path)
        for name, span in read_header(shard).items()
    )


def _quantise_shards(base: BaseModel, staging: Path, quiet: bool) -> None:
    from safetensors.torch import save_file

    weights = {module + WEIGHT for module in base.modules}
    shards = shards_of(base.path)
    weight_map: dict[str, str] = {}
    written = 0
    console = Console(file=sys.stderr)
    for shard in track(shards, "base: to NF4, once", console=console, transient=True, disable=quiet):
        tensors = dict(_quantised(shard, weights))
        save_file(tensors, staging / shard.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard.name)
        written += sum(tensor.nbytes for tensor in tensors.values())
    if [shard.name for shard in shards] != [SINGLE]:
        index = {"metadata": {"total_size": written}, "weight_map": weight_map}
        (staging / INDEX).write_text(json.dumps(index, indent=1))


def _quantised(shard: Path, weights: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the shard, the linear weights packed."""
    from bitsandbytes.functional import quantize_4bit
    from safetensors import safe_open

    with safe_open(shard, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            tensor = file.get_tensor(name)
            if name in weights:
                packed, state = quantize_4bit(tensor, compress_statistics=True, quant_type="nf4")
                yield name, packed
                yield from ((f"{name}.{part}", value) for part, value in state.as_dict(packed=True).items())
            else:
                yield name, tensor


def _write_config(source: Path, staging: Path) -> None:
    """Last: a directory with a configuration is a complete one."""
    config: dict[str, Any] = json.loads((source / CONFIG).read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }
    (staging / CONFIG).write_text(json.dumps(config, indent=2))


def _copy_small_files(source: Path, staging: Path) -> None:
    """Tokenizer, chat template, generation configuration: whatever is no weight and no description of weights."""
    for path in source.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt") and path.name not in (CONFIG, INDEX):
            shutil.copyfile(path, staging / path.name)


def main(argv: Sequence[str]) -> int:
    """BASE_DIRECTORY DESTINATION FINGERPRINT_CACHE"""
    base, destination, fingerprints = (Path(argument) for argument in argv)
    try:
        prequantize(BaseModel.read(base, cache_dir=fingerprints), destination)
    except OSError as error:
        Console().print(str(error), soft_wrap=True, markup=False)  # on stdout: stderr has the progress bar
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
