"""The adapter's README.md: the model card that model hubs show, with the measured before and after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from adapters.train.config import TrainConfig
from adapters.train.evaluate import Verdict
from adapters.train.method_sections import PROMPTING, PeftSection

CARD = """\
---
{header}---

# {name}

{description}

{kind} for `{base}`, trained for {steps} steps with loraplex.

| loss on held-out conversations (nats per trained token) | |
|---|---|
| base | {held_out_base:.3f} |
| adapter | {held_out_adapter:.3f} |

{general}![loss over the steps](loss.png)

{ranks}{answers}
Base fingerprint, quantisation, chat template hash, data hash, configuration and library versions are in
`loraplex.json`; the log of every step is in `log.jsonl`.
"""


def write_card(config: TrainConfig, verdict: Verdict, steps: int, ranks: Mapping[str, int], path: Path) -> None:
    base = config.model.model_name_or_path.resolve().name
    header = {"library_name": "peft", "tags": [config.peft.method, "loraplex"], "base_model": base}
    text = CARD.format(
        header=yaml.safe_dump(header, sort_keys=False),
        name=config.output.name,
        description=config.output.description,
        kind=_kind(config.peft),
        ranks=_ranks(ranks, config.peft),
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


def _kind(section: PeftSection) -> str:
    """In words; the section's `auto` are resolved."""
    if section.method == "adalora":
        own = section.adalora
        return (
            f"An AdaLoRA adapter (rank {own.init_r}, taken down to {own.target_r} on average, alpha "
            f"{section.lora_alpha})"
        )
    if section.method == "ia3":
        return "An IA³ adapter (vectors that scale keys, values and activations)"
    if section.method in PROMPTING:
        return f"A {section.method} of {section.num_virtual_tokens} trained vectors"
    variants = {"rank-stabilised": section.use_rslora, "DoRA": section.use_dora}
    named = [name for name, on in variants.items() if on]
    if section.init_lora_weights != "default":
        named.append(f"{section.init_lora_weights} initialisation")
    return f"A LoRA adapter ({', '.join([f'rank {section.r}', f'alpha {section.lora_alpha}', *named])})"


def _ranks(ranks: Mapping[str, int], section: PeftSection) -> str:
    """AdaLoRA's: how many are left of each kind of module, on average over the layers."""
    if not ranks:
        return ""
    kinds: dict[str, list[int]] = {}
    for module, rank in ranks.items():
        kinds.setdefault(module.rpartition(".")[2], []).append(rank)
    lines = "".join(f"| {kind} | {sum(kept) / len(kept):.2f} |\n" for kind, kept in kinds.items())
    total = f"{sum(ranks.values())} of {section.adalora.init_r * len(ranks)} ranks are left.\n\n"
    return f"{total}| module | mean rank kept |\n|---|---|\n{lines}\n![rank kept in every module](ranks.png)\n\n"


def _answers(verdict: Verdict) -> str:
    """Quoted, so that nothing in an answer can become markup of the card."""
    rows = zip(verdict.prompts, verdict.before, verdict.after, strict=True)
    return "".join(
        f"**{prompt}**\n\nBase:\n\n{_quoted(before)}\n\nAdapter:\n\n{_quoted(after)}\n\n"
        for prompt, before, after in rows
    )


def _quoted(text: str) -> str:
    return "\n".join(f">     {line}" for line in text.splitlines() or [""])
