from typing import Any

import pytest

from adapters.train.data import Conversation
from adapters.train.labels import encode
from adapters.train.viewer import ENDS, READ, TRAINED, draw

TALK = Conversation(
    ({"role": "user", "content": "Hi [bold]"}, {"role": "assistant", "content": "Ahoy 🏴‍☠️!"}), "rows.jsonl:1"
)


@pytest.fixture
def drawn(tokenizer: Any) -> Any:
    return draw(encode(TALK, tokenizer, 512), tokenizer)


def test_trained_words_are_bracketed_and_nothing_is_taken_for_markup(drawn: Any) -> None:
    assert drawn.plain.startswith("rows.jsonl:1: ")
    assert "Hi [bold]" in drawn.plain
    inside = drawn.plain.partition("⟦")[2].partition("⟧")[0]
    assert inside.startswith("Ahoy")
    assert inside.endswith("<|im_end|>")
    assert drawn.plain.count("⟦") == drawn.plain.count("⟧") == 1


def test_the_end_token_and_trained_words_have_styles_of_their_own(drawn: Any) -> None:
    styles = {drawn.plain[span.start : span.end]: str(span.style) for span in drawn.spans}
    ends = [drawn.plain[span.start : span.end] for span in drawn.spans if str(span.style) == ENDS]
    assert ends == ["<|im_end|>"]
    trained = "".join(text for text, style in styles.items() if style in TRAINED)
    assert trained.startswith("Ahoy")
    assert styles["user"] in READ
