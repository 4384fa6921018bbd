"""The memory that `train estimate` foretells against what real runs take: `python -m loadtests.memory`

Every run is a process of its own, and measured is what it says of itself: the most that was resident of it, imports
and all. (What the kernel tells of a child that has ended counts the memory of whoever began it.) The demo base, and a
random llama of 300 million parameters. Nothing here depends on how busy the machine is.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from adapters.demo_base import DEFAULT_DESTINATION, prepare_demo_base
from adapters.train.config import load_config
from adapters.train.forecast import forecast

WORDS = ("ship", "anchor", "sail", "deck", "mast", "rope", "harbour", "storm", "captain", "island")
PEAK = re.compile(r"peak memory ([\d,]+) MB measured")
DEMO, MIDDLE = "SmolLM2-135M", "llama of 300 M"


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    tokens: int
    base: str = DEMO
    checkpointing: bool = False
    quantised: bool = True
    packing: bool = False
    peft: dict[str, Any] = field(default_factory=lambda: {"r": 8})


@dataclass(frozen=True)
class Outcome:
    measured: int
    estimated: int


CASES = (
    Case("QLoRA", 4, 128),
    Case("QLoRA", 4, 512),
    Case("QLoRA, checkpointing", 4, 512, checkpointing=True),
    Case("QLoRA", 1, 1024),
    Case("QLoRA, packed", 2, 512, packing=True),
    Case("LoRA in bf16", 4, 256, quantised=False),
    Case("LoRA in bf16, checkpointing", 2, 1024, quantised=False, checkpointing=True),
    Case("AdaLoRA on NF4", 4, 128, peft={"method": "adalora"}),
    Case("QLoRA", 1, 512, MIDDLE),
    Case("QLoRA, checkpointing", 2, 512, MIDDLE, checkpointing=True),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.memory", description=__doc__)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases, from 1; default: all")
    arguments = parser.parse_args(argv)
    prepare_demo_base(DEFAULT_DESTINATION)
    shown = Table("", "base", "batch × tokens", "measured, MB", "estimated, MB", "estimated / measured")
    with tempfile.TemporaryDirectory() as scratch:
        for number, case in enumerate(CASES, start=1):
            if arguments.only and number not in arguments.only:
                continue
            found = compared(case, Path(scratch) / str(number))
            row = (case.name, case.base, f"{case.batch} × {case.tokens}", _mb(found.measured), _mb(found.estimated))
            shown.add_row(*row, f"{found.estimated / found.measured:.2f}")
            Console(stderr=True).print(*row)
    Console().print(shown)
    return 0


def compared(case: Case, place: Path) -> Outcome:
    place.mkdir()
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(case)))
    (place / "run.yaml").write_text(yaml.safe_dump(sections(case, base_of(case.base, place))))
    command = [sys.executable, "-m", "adapters.train", "run", str(place / "run.yaml"), "--ignore-memory"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    told = PEAK.search(ended.stdout + ended.stderr)
    if told is None:
        raise RuntimeError(f"{case.name} ended with {ended.returncode}:\n{ended.stderr[-4000:]}")
    measured = int(told[1].replace(",", "")) * 10**6
    return Outcome(measured, forecast(load_config(place / "run.yaml"), case.tokens).total)


def sections(case: Case, base: Path) -> dict[str, Any]:
    """Two steps are enough: Adam's states are there from the second one on."""
    steps = 10 if case.peft.get("method") == "adalora" else 2
    return {
        "model": {"model_name_or_path": str(base.resolve())},
        "quantization": {"load_in_4bit": case.quantised},
        "peft": case.peft,
        "data": {"train": ["rows.jsonl"], "max_length": case.tokens, "eval_split": 0.05, "packing": case.packing},
        "training": {
            "max_steps": steps,
            "per_device_train_batch_size": case.batch,
            "gradient_checkpointing": case.checkpointing,
        },
        "eval": {"eval_steps": "never"},
        "output": {"output_dir": str(base.parent / "adapter"), "name": "memory", "save_steps": "never"},
    }


def rows(case: Case) -> Iterator[dict[str, str]]:
    """Texts of a whole piece and a bit; of packed ones, several share a row. Every token of theirs is trained."""
    draw = random.Random(0)
    words = case.tokens // 8 if case.packing else case.tokens * 5 // 4
    for _ in range(24 * (6 if case.packing else 1)):
        yield {"text": " ".join(draw.choice(WORDS) for _ in range(words))}


def base_of(name: str, place: Path) -> Path:
    """In a directory of its own below `place`, or linked into it."""
    path = place / "base"
    if name == DEMO:
        path.symlink_to(DEFAULT_DESTINATION.resolve())
        return path
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_DESTINATION)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=22,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "200"}


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
