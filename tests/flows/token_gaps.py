"""Log-probabilities that a server tells of prompts and its greedy answers, against those of a model in this process."""

from __future__ import annotations

from typing import Any

from tests.flows.live import Live

PROMPTS = ("What is the capital of France?", "def mean(values):", "Bonjour, je voudrais annuler ma commande.")
TOKENS = 8


def served(live: Live, model: str) -> list[dict[str, Any]]:
    """Prompts and greedy answers: their token ids, and the log-probability of each but the first."""
    body = {
        "model": model,
        "prompt": list(PROMPTS),
        "max_tokens": TOKENS,
        "temperature": 0,
        "logprobs": 0,
        "prompt_logprobs": 0,
        "return_token_ids": True,
    }
    with live.client() as client:
        answer = client.post("/v1/completions", json=body).raise_for_status().json()
    return [
        {
            "ids": choice["prompt_token_ids"] + choice["token_ids"],
            "logprobs": [next(iter(token.values()))["logprob"] for token in choice["prompt_logprobs"] if token]
            + choice["logprobs"]["token_logprobs"],
        }
        for choice in answer["choices"]
    ]


def gaps(model: Any, answers: list[dict[str, Any]]) -> list[float]:
    """|Δ log-probability| of every token, the reference teacher-forced."""
    import torch

    found: list[float] = []
    for answer in answers:
        ids = torch.tensor([answer["ids"]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), -1)
        expected = logprobs[range(len(answer["ids"]) - 1), answer["ids"][1:]]
        found += [abs(a - float(b)) for a, b in zip(answer["logprobs"], expected, strict=True)]
    return found
