"""The held-out loss of an adapter that loadtests.training made, ours or TRL's, by one and the same measure.

python -m loadtests.training_loss BASE DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(base: Path, place: Path) -> float:
    from peft import PeftModel

    from adapters.train import model as models
    from adapters.train.data import Conversation
    from adapters.train.evaluate import held_out_loss
    from adapters.train.labels import encode_all
    from adapters.train.sections import ModelSection, QuantizationSection

    section = ModelSection(model_name_or_path=base)
    tokenizer = models.load_tokenizer(section)
    rows = [row["messages"] for row in json.loads((place / "held_out.json").read_text())]
    examples = encode_all(
        [Conversation(tuple(row), f"row {number}") for number, row in enumerate(rows)], tokenizer, 512
    )
    model = PeftModel.from_pretrained(models.load_base(section, QuantizationSection()), str(place / "adapter"))
    return held_out_loss(model, examples, tokenizer.pad_token_id, 4)


if __name__ == "__main__":
    sys.stdout.write(f"{main(Path(sys.argv[1]), Path(sys.argv[2]))}\n")
