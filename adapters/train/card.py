"""The adapter's README.md: the model card that model hubs show, with the measured before and after."""

from __future__ import annotations

from pathlib import Path

import yaml

from adapters.train.config import TrainConfig
from adapters.train.evaluate import Verdict

CARD = """\
---
{header}---

# {name}

{description}

A LoRA adapter (rank {rank}, alpha {alpha}) for `{base}`, trained for {steps} steps with loraplex.

| loss on held-out conversations (nats per trained token) | |
|---|---|
| base | {held_out_base:.3f} |
| adapter | {held_out_adapter:.3f} |

{general}![loss over the steps](loss.png)

{answers}
Base fingerprint, quantisation, chat template hash, data hash, configuration and library versions are in
`loraplex.json`; the log of every step is in `log.jsonl`.
"""


def write_card(config: TrainConfig, verdict: Verdict, steps: int, path: Path) -> None:
    base = config.model.model_name_or_path.resolve().name
    header = {"library_name": "peft", "tags": ["lora", "loraplex"], "base_model": base}
    text = CARD.format(
        header=yaml.safe_dump(header, sort_keys=False),
        name=config.output.name,
        description=config.output.description,
        rank=config.peft.r,
        alpha=config.peft.lora_alpha,
        base=base,
        steps=steps,
        held_out_base=verdict.held_out_base,
        held_out_adapter=verdict.held_out_adapter,
        general=_general(verdict),
        answers=_answers(verdict),
    )
    path.write_text(text, encoding="utf-8")


def _general(verdict: Verdict) -> str:
    """What was forgotten, where it was measured."""
    if verdict.forgotten is None:
        return ""
    return (
        "| loss on general data that it was not trained for | |\n|---|---|\n"
        f"| base | {verdict.general_base:.3f} |\n| adapter | {verdict.general_adapter:.3f} |\n"
        f"| forgotten | {verdict.forgotten:+.3f} |\n\n"
    )


def _answers(verdict: Verdict) -> str:
    """Quoted, so that nothing in an answer can become markup of the card."""
    rows = zip(verdict.prompts, verdict.before, verdict.after, strict=True)
    return "".join(
        f"**{prompt}**\n\nBase:\n\n{_quoted(before)}\n\nAdapter:\n\n{_quoted(after)}\n\n"
        for prompt, before, after in rows
    )


def _quoted(text: str) -> str:
    return "\n".join(f">     {line}" for line in text.splitlines() or [""])
