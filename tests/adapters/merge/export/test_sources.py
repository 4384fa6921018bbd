from __future__ import annotations

from pathlib import Path

import pytest

from adapters.base import BaseModel
from adapters.merge.bases import BaseChoice, for_nf4
from adapters.merge.export.sources import merged
from adapters.prequantized import prequantize
from tests.adapters.merge.export.tiny import save_adapter, save_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "tiny", intermediate_size=128)


def test_what_becomes_nf4_again_is_merged_into_values_that_do_not_lie_on_its_levels(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", r=4, lora_alpha=8)

    def choice(*, to_nf4: bool) -> str:
        scratch = tmp_path / str(to_nf4)
        scratch.mkdir()
        return merged(adapter, base, "auto", scratch, lambda *_: None, to_nf4=to_nf4).notes[0]

    assert "the dequantized values of the base" in choice(to_nf4=False)
    assert "the original values of the base: NF4 of values that NF4 left already" in choice(to_nf4=True)


def test_what_is_asked_for_is_done_and_a_packed_base_has_no_others(base: Path, tmp_path: Path) -> None:
    plain = BaseModel.read(base)
    assert isinstance(for_nf4(plain, "auto"), BaseChoice)
    assert for_nf4(plain, "dequantized") == "dequantized"
    prequantize(plain, tmp_path / "packed")
    assert for_nf4(BaseModel.read(tmp_path / "packed"), "auto") == "auto"
