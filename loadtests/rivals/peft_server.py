"""The rival most people start with: transformers + PEFT behind a web server, an NF4 base, one request at a time.

python -m loadtests.rivals.peft_server --model DIR --name BASE --port N NAME=ADAPTER_DIR …
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from loadtests.rivals.completions import serve


class Decoder:
    """The model with every adapter in memory."""

    def __init__(self, model: str, name: str, adapters: dict[str, str]) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        from adapters.nf4 import repair_dequantize

        repair_dequantize()
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        self.models = (name, *adapters)
        self.adapters = adapters
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self._model = AutoModelForCausalLM.from_pretrained(
            model, quantization_config=quantization, dtype=torch.bfloat16
        ).eval()
        for number, (adapter, path) in enumerate(adapters.items()):
            if number == 0:
                self._model = PeftModel.from_pretrained(self._model, path, adapter_name=adapter)
            else:
                self._model.load_adapter(path, adapter_name=adapter)

    def text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))

    def tokens(self, model: str, prompt: list[int], count: int) -> Iterator[int]:
        """Greedy, one at a time, with the KV cache of transformers."""
        import torch

        if model in self.adapters:
            self._model.set_adapter(model)
        with torch.inference_mode(), nullcontext() if model in self.adapters else self._without_adapter():
            rows, cache = torch.tensor([prompt]), None
            for _ in range(count):
                step = self._model(input_ids=rows, past_key_values=cache, use_cache=True, logits_to_keep=1)
                rows, cache = step.logits[:, -1:].argmax(-1), step.past_key_values
                yield int(rows)

    def _without_adapter(self) -> Any:
        return self._model.disable_adapter() if self.adapters else nullcontext()


def main() -> None:
    parser = argparse.ArgumentParser(description="transformers + PEFT as a server, for comparison")
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("adapters", nargs="*", help="NAME=DIRECTORY")
    arguments = parser.parse_args()
    adapters = dict(pair.split("=", 1) for pair in arguments.adapters)
    serve(Decoder(arguments.model, arguments.name, adapters), arguments.port)


if __name__ == "__main__":
    main()
