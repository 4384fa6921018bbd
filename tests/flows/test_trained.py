"""Every servable method, trained by us, handed in at the door, and served: PEFT's own log-probabilities.

In fp32 on both sides. PEFT reads what training left, before anything is converted, and puts it on the base that was
trained on: where that was in NF4, on the 4-bit layers themselves, whose values the engine serves. As served by default,
with NF4 layers in bf16, `test_parity.py` compares the demo's two adapters, which are QLoRA.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from adapters.base import BaseModel
from tests.adapters.train.servable import SERVABLE
from tests.flows.live import Live
from tests.flows.token_gaps import gaps, served
from tests.flows.trained import trained

pytestmark = pytest.mark.engine
TOLERANCE = 1e-4
"""Nats, of any token. Measured: 5.1e-5 at most."""
LEAST_CHANGE = 0.3
"""Of the base's log-probabilities, or an adapter without effect would pass as well."""
NOTE = "loraplex.json"
"""Says which base it was trained on."""
ROWS = [
    {"prompt": "Who are you?", "completion": " A sailor."},
    {"prompt": "What is the capital of France?", "completion": " Ask the gulls."},
    {"prompt": "How do I boil an egg?", "completion": " In sea water."},
    {"prompt": "Why is the sky blue?", "completion": " It looks at the sea."},
    {"prompt": "Where is my parcel?", "completion": " Below deck."},
    {"prompt": "Good morning!", "completion": " Ahoy!"},
]
CONVERTED = ("pissa", "olora", "adalora")
ON_NF4 = ("qlora", "loftq")
"""The others are trained on the same values, unpacked, which takes less time."""
METHODS = {name: peft for name, (peft, _) in SERVABLE.items() if name != "adalora on nf4"}


@pytest.fixture(scope="module")
def bases(base: BaseModel, exact: Live) -> dict[bool, Any]:
    """By whether its layers are in NF4."""
    from adapters.train.model import load_base
    from adapters.train.sections import ModelSection, QuantizationSection

    def loaded(path: Path, *, on_nf4: bool) -> Any:
        section = ModelSection(model_name_or_path=path, dtype="float32")
        return load_base(section, QuantizationSection(load_in_4bit=on_nf4)).eval()

    return {True: loaded(base.path, on_nf4=True), False: loaded(exact.base.path, on_nf4=False)}


@pytest.mark.parametrize("name", METHODS)
def test_what_was_trained_is_what_is_served(
    exact: Live, base: BaseModel, bases: dict[bool, Any], tmp_path: Path, name: str
) -> None:
    from peft import PeftModel

    on_nf4 = name in ON_NF4
    peft = {"target_modules": "attention-qv", **METHODS[name]}
    steps = {"max_steps": 10} if name == "adalora" else None  # fewer leave it nothing to reallocate
    directory = trained(base.path if on_nf4 else exact.base.path, tmp_path, ROWS, peft, steps, on_nf4=on_nf4)
    ignored = shutil.ignore_patterns(NOTE) if on_nf4 else None  # or the values of its base would be another base
    response = exact.upload("trained", shutil.copytree(directory, tmp_path / "sent", ignore=ignored))
    assert response.status_code == 201, response.text
    try:
        verdict = f"converted exactly from {name}" if name in CONVERTED else "served as it came"
        assert response.json()["verdict"] == verdict
        answers = served(exact, "trained")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # AdaLoRA may leave nothing of a module, which peft then misses
            reference = PeftModel.from_pretrained(copy.deepcopy(bases[on_nf4]), str(directory)).eval()
        off, idle = gaps(reference, answers), gaps(bases[on_nf4], answers)
        print(f"trained {name}: {len(off)} tokens, |dlogp| {max(off):.2g} at most; base {max(idle):.2g}")
        assert max(off) < TOLERANCE
        assert max(idle) > LEAST_CHANGE
    finally:
        with exact.client() as client:
            assert client.delete("/v1/adapters/trained").json()["deleted"]
