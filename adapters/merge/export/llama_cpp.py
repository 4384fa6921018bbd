"""What llama.cpp computes with a GGUF file: tokens, log-probabilities, greedy answers. A Reader, asked over loopback.

It knows nothing of how the file was made.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import httpx
import numpy as np

from adapters.errors import NotTheSame
from adapters.tensor_values import Matrix

PACKAGE = "xllamacpp"
LISTED = 4096
"""So many of the likeliest tokens are asked for: all of 49,152 take a third of a second each time."""
FORCED = 1e4
TIMEOUT_S = 600.0
LAST_WORDS = 2000


def is_there() -> bool:
    return find_spec(PACKAGE) is not None


def version() -> str:
    return f"llama.cpp ({PACKAGE} {metadata.version(PACKAGE)})"


class LlamaCpp:
    """A file that is loaded."""

    def __init__(self, http: httpx.Client, vocabulary: int) -> None:
        self._http = http
        self._vocabulary = vocabulary
        self._plain = self.tokens("a")[-1]

    def tokens(self, text: str) -> list[int]:
        """Names of special tokens in the text are those tokens; what begins every text is added."""
        asked = {"content": text, "add_special": True, "parse_special": True}
        return [int(token) for token in self._post("/tokenize", asked)["tokens"]]

    def rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A chat through the file's own template, to be answered."""
        return str(self._post("/apply-template", {"messages": list(messages)})["prompt"])

    def log_probabilities(self, tokens: Sequence[int]) -> Matrix:
        """[vocabulary] of what comes behind these tokens; NaN for those that are not among the likeliest."""
        listed = min(LISTED, self._vocabulary)
        asked = {"prompt": list(tokens), "n_predict": 1, "temperature": 0, "n_probs": listed, "cache_prompt": True}
        asked["logit_bias"] = [[self._plain, FORCED]]  # half a letter would not be told; what is listed knows no bias
        found = self._post("/completion", asked)["completion_probabilities"][0]["top_logprobs"]
        row = np.full(self._vocabulary, np.nan, np.float32)
        row[[each["id"] for each in found]] = [each["logprob"] for each in found]
        return row

    def rows(self, tokens: Sequence[int], places: Sequence[int]) -> Matrix:
        return np.stack([self.log_probabilities(tokens[:place]) for place in places])

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """Without the token that ends the answer."""
        asked = {"prompt": list(tokens), "n_predict": count, "temperature": 0, "return_tokens": True}
        found = self._post("/completion", asked)
        tokens = [int(token) for token in found["tokens"]]
        return tokens[:-1] if found["stop_type"] == "eos" else tokens

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        answer = self._http.post(path, json=body)
        if answer.is_error:
            raise NotTheSame(f"llama.cpp answered {answer.status_code}: {answer.text[:300]}", code="not_loaded")
        found: dict[str, Any] = answer.json()
        return found


@contextmanager
def loaded(
    model: Path, vocabulary: int, lora: Path | None = None, *, context: int = 2048, threads: int = 1
) -> Iterator[LlamaCpp]:
    """Raises NotTheSame where llama.cpp cannot read it, with its last words."""
    command = [sys.executable, "-m", "adapters.merge.export.llama_server", str(model)]
    command += ["--context", str(context), "--threads", str(threads), *(["--lora", str(lora)] if lora else [])]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = _address(process.stdout)
            if address is None:
                raise NotTheSame(f"llama.cpp cannot load {model.name}: {_last_words(said)}", code="not_loaded")
            with httpx.Client(base_url=address, timeout=TIMEOUT_S, trust_env=False) as http:
                yield LlamaCpp(http, vocabulary)
        except httpx.TransportError as error:
            raise NotTheSame(f"llama.cpp ended: {error}: {_last_words(said)}", code="not_loaded") from error
        finally:
            process.stdin.close()
            process.stdout.close()
            process.wait()


def _address(out: IO[str]) -> str | None:
    """llama.cpp may say other things first."""
    return next((line.strip() for line in out if line.startswith("http://")), None)


def _last_words(said: IO[str]) -> str:
    said.seek(0)
    return said.read()[-LAST_WORDS:].strip()
