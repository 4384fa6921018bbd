"""The rival for a single user on a CPU: llama.cpp through `llama-cpp-python`, the base alone, one request at a time.

    python -m loadtests.rivals.llama_cpp_server --gguf FILE --name BASE --port N --threads N

It can put one adapter on a model, not several in a batch. `pip install llama-cpp-python` compiles it, for minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from loadtests.rivals.completions import serve


class Decoder:
    def __init__(self, gguf: str, name: str, threads: int) -> None:
        try:
            from llama_cpp import Llama
        except ImportError:
            raise SystemExit(
                "llama-cpp-python is not installed here: `.venv/bin/python -m pip install llama-cpp-python`, which "
                "compiles it for minutes"
            ) from None

        self.models = (name,)
        self._model = Llama(gguf, n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)

    def text(self, token: int) -> str:
        return str(self._model.detokenize([token]).decode(errors="replace"))

    def tokens(self, model: str, prompt: list[int], count: int) -> Iterator[int]:
        """Greedy, from an empty cache: no prompt is found in one because of another."""
        self._model.reset()
        self._model.eval(prompt)
        for number in range(count):
            token = int(self._model.sample(temp=0.0, repeat_penalty=1.0))
            yield token
            if number < count - 1:
                self._model.eval([token])


def main() -> None:
    parser = argparse.ArgumentParser(description="llama.cpp as a server, for comparison")
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    serve(Decoder(arguments.gguf, arguments.name, arguments.threads), arguments.port)


if __name__ == "__main__":
    main()
