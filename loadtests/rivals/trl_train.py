"""The rival most people train with: TRL's SFTTrainer with PEFT on an NF4 base, written as TRL's documentation shows.

    python -m loadtests.rivals.trl_train SETTINGS.json

TRL is not among our dependencies; loadtests/training.py says how to have it for this. Prints the seconds of every step
as JSON. Its defaults stay, but for what both sides of the comparison are given.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(settings: dict[str, Any]) -> list[float]:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Times the steps; the trainer itself only tells the whole."""

        seconds: list[float] = []  # noqa: RUF012  one run a process
        begun = 0.0

        def on_step_begin(self, *arguments: Any, **keywords: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            self.seconds.append(time.perf_counter() - self.begun)

    dtype = getattr(torch, settings["dtype"])
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(settings["base"], dtype=dtype, quantization_config=quantization)
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(settings["base"]),
        train_dataset=load_dataset("json", data_files=settings["data"], split="train", cache_dir=settings["cache"]),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=settings["r"], lora_alpha=settings["lora_alpha"], target_modules="all-linear"
        ),
        args=SFTConfig(
            output_dir=settings["output"],
            max_steps=settings["max_steps"],
            per_device_train_batch_size=settings["batch"],
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="constant",
            max_length=settings["max_length"],
            gradient_checkpointing=settings["gradient_checkpointing"],
            bf16=settings["dtype"] == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            seed=settings["seed"],
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        callbacks=[Watch()],
    )
    trainer.train()
    trainer.save_model(settings["output"])
    return Watch.seconds


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))) + "\n")
