"""Run as a child process: vLLM as it comes, without our plugin, loads a directory and says how likely tokens are.

    LORAPLEX_PLUGIN=off python -m tests.flows.vllm_alone MODEL_DIR DTYPE CHATS_JSON OUT_JSON

CHATS_JSON: lists of token ids. OUT_JSON: for each of them, at each place but the first, the likeliest tokens and the
one that stands there, with log-probabilities. Nothing tells vLLM how the directory is quantised.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

LISTED = 1000
"""At each place: all others together are less than rounding."""
CACHE_BYTES = 200_000_000


def main(model: str, dtype: str, chats: str, out: str) -> None:
    from vllm import LLM, SamplingParams

    small = {"max_model_len": 512, "enforce_eager": True, "kv_cache_memory_bytes": CACHE_BYTES}
    llm = LLM(model=model, dtype=dtype, max_logprobs=LISTED, **small)
    given = [{"prompt_token_ids": tokens} for tokens in json.loads(Path(chats).read_text())]
    outputs = llm.generate(given, SamplingParams(max_tokens=1, prompt_logprobs=LISTED), use_tqdm=False)
    heard = [
        [{token: each.logprob for token, each in place.items()} for place in output.prompt_logprobs[1:]]
        for output in outputs
    ]
    Path(out).write_text(json.dumps(heard))


if __name__ == "__main__":
    main(*sys.argv[1:])
