"""The label viewer: an example's tokens as they are read, the trained ones in colour and the ends of turns marked.

The only way to see that a mask is right is to look at it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from adapters.train.labels import IGNORED, Example

TRAINED = ("black on green3", "black on sea_green3")
"""Two shades in turn, so that the borders of tokens are seen."""
ENDS = "bold white on dark_green"
READ = ("default", "dim")


def draw(example: Example, tokenizer: Any) -> Text:
    """Place, numbers, and the text; where there is no colour, what is trained stands between ⟦ and ⟧."""
    cut = f", cut from {example.whole}" if example.truncated else ""
    text = Text(f"{example.place}: {len(example.ids)} tokens{cut}, {example.trained_tokens} trained\n", style="bold")
    body = Text(style="default")
    trained = False
    for number, (token, label) in enumerate(zip(example.ids, example.labels, strict=True)):
        if (label != IGNORED) != trained:
            trained = not trained
            body.append("⟦" if trained else "⟧", style="bold green3")
        shades = TRAINED if trained else READ
        style = ENDS if number in example.ends else shades[number % 2]
        body.append(_shown(tokenizer, token), style=style)
    if trained:
        body.append("⟧", style="bold green3")
    return text.append_text(body)


def draw_all(examples: Sequence[Example], tokenizer: Any) -> list[Text]:
    return [draw(example, tokenizer) for example in examples]


def _shown(tokenizer: Any, token: int) -> str:
    """A newline is seen as one and still breaks the line; a part of a character is shown as its token."""
    piece = str(tokenizer.decode([token]))
    if "\ufffd" in piece:
        piece = str(tokenizer.convert_ids_to_tokens(token))
    return "".join("↵\n" if c == "\n" else c if c.isprintable() else f"\\x{ord(c):02x}" for c in piece)
