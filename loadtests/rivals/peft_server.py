"""The rival most people start with: transformers + PEFT behind a web server, an NF4 base, one request at a time.

`python -m loadtests.rivals.peft_server --model DIR --name BASE --port N NAME=ADAPTER_DIR …`. It speaks as much of
`/v1/completions` as the load generator asks for: token numbers in, server-sent events out, greedy, no end token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse


class Decoder:
    """The model with every adapter in memory; `tokens` generates, and must not run twice at once."""

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
        self.name = name
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


def create_app(decoder: Decoder) -> FastAPI:
    app = FastAPI()
    turn = asyncio.Lock()

    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await request.json()
        if body["model"] not in (decoder.name, *decoder.adapters):
            return JSONResponse({"error": {"message": f"unknown model {body['model']}"}}, 404)
        return StreamingResponse(_events(decoder, turn, body), media_type="text/event-stream")

    return app


async def _events(decoder: Decoder, turn: asyncio.Lock, body: dict[str, Any]) -> AsyncIterator[str]:
    async with turn:
        tokens = decoder.tokens(body["model"], body["prompt"], body["max_tokens"])
        while (token := await asyncio.to_thread(next, tokens, None)) is not None:
            text = decoder.tokenizer.decode([token])
            yield f"data: {json.dumps({'choices': [{'index': 0, 'text': text}]})}\n\n"
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
    yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="transformers + PEFT as a server, for comparison")
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("adapters", nargs="*", help="NAME=DIRECTORY")
    arguments = parser.parse_args()
    adapters = dict(pair.split("=", 1) for pair in arguments.adapters)
    app = create_app(Decoder(arguments.model, arguments.name, adapters))
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
