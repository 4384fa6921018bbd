"""adapter_config.json as PEFT and the engine read it; what they would ignore or refuse is refused here."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import InvalidAdapter
from adapters.peft_config import LoraConfig, read_config
from adapters.refusals import REFUSALS
from tests.adapters.factories import lora_config

QUERY = "model.layers.0.self_attn.q_proj"
UP = "model.layers.11.mlp.up_proj"


def read(path: Path, max_rank: int = 64, **changes: Any) -> LoraConfig:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(lora_config(**changes)))
    return read_config(file, max_rank)


def refusal(path: Path, **changes: Any) -> InvalidAdapter:
    with pytest.raises(InvalidAdapter) as error:
        read(path, **changes)
    assert error.value.code in REFUSALS
    assert error.value.message.endswith(REFUSALS[error.value.code])
    return error.value


def test_scaling_is_alpha_over_rank(tmp_path: Path) -> None:
    config = read(tmp_path, r=16, lora_alpha=32)
    assert (config.rank_of(QUERY), config.scaling_of(QUERY)) == (16, 2.0)


def test_rank_stabilised_scaling_is_alpha_over_root_of_rank(tmp_path: Path) -> None:
    assert read(tmp_path, r=16, lora_alpha=32, use_rslora=True).scaling_of(QUERY) == 8.0


def test_patterns_match_whole_name_parts_from_the_end_and_the_first_wins(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        rank_pattern={"proj": 1, r"layers\.1\d\.mlp\.up_proj": 8, "up_proj": 2},
        alpha_pattern={"^model.layers.(0|1).self_attn.q_proj": 3},
    )
    assert (config.rank_of(QUERY), config.scaling_of(QUERY)) == (4, 0.75)
    assert (config.rank_of(UP), config.scaling_of(UP)) == (8, 1.0)


def test_ranks_and_scalings_are_those_of_peft_and_of_the_engine(tmp_path: Path) -> None:
    get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key
    helper = pytest.importorskip("vllm.lora.peft_helper").PEFTHelper
    patterns = {"q_proj": 1, "layers.0.*": 2, r"model\.layers\.\d+\.mlp\.up_proj": 3, "(k|v)_proj": 5, "self": 6, "": 7}
    modules = (QUERY, UP, "model.layers.0.mlp.up_proj", "model.layers.3.self_attn.k_proj", "q_proj", "xq_proj")
    for count in range(len(patterns)):
        some = dict(list(patterns.items())[:count])
        raw = lora_config(rank_pattern=some, alpha_pattern=dict(reversed(some.items())), use_rslora=count % 2 == 0)
        config = read(tmp_path, **raw)
        engine = helper.from_dict(raw)
        for module in modules:
            assert config.rank_of(module) == some.get(get_pattern_key(list(some), module), 4)
            assert (config.rank_of(module), config.scaling_of(module)) == engine.get_rank_and_scaling(module)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"peft_type": "IA3"}, "not_lora"),
        ({"peft_type": "ADALORA"}, "not_lora"),
        ({"peft_type": 1}, "not_lora"),
        ({"use_dora": True}, "dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "lora_bias"),
        ({"bias": None}, "lora_bias"),
        ({"modules_to_save": ["score"]}, "modules_to_save"),
        ({"alora_invocation_tokens": [1, 2]}, "alora"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [0]}, "trainable_tokens"),
        ({"target_parameters": ["experts.weight"]}, "target_parameters"),
        ({"use_bdlora": {"nblocks": 2}}, "unsupported_variant"),
        ({"use_qalora": True}, "unsupported_variant"),
        ({"kasa_config": {"beta": 1}}, "unsupported_variant"),
        *[
            ({"init_lora_weights": init}, "modified_base")
            for init in ("pissa", "pissa_niter_4", "OLoRA", "corda", "loftq")
        ],
        ({"r": 0}, "bad_config"),
        ({"r": -1}, "bad_config"),
        ({"r": True}, "bad_config"),
        ({"r": 4.0}, "bad_config"),
        ({"r": None}, "bad_config"),
        ({"lora_alpha": "8"}, "bad_config"),
        ({"lora_alpha": None}, "bad_config"),
        ({"lora_alpha": 10**400}, "bad_scaling"),
        ({"lora_alpha": -1e300}, "bad_scaling"),
        ({"target_modules": None}, "bad_config"),
        ({"target_modules": [1]}, "bad_config"),
        ({"use_rslora": 1}, "bad_config"),
        ({"rank_pattern": ["q_proj"]}, "bad_config"),
        ({"rank_pattern": {"q_proj": [True, False]}}, "bad_config"),
        ({"rank_pattern": {"q_proj": 0}}, "bad_config"),
        ({"alpha_pattern": {"q_proj": "x"}}, "bad_config"),
        ({"r": 65}, "rank_too_large"),
        ({"rank_pattern": {"never_matched": 65}}, "rank_too_large"),
        ({"rank_pattern": {"(": 1}}, "unsupported_pattern"),
        ({"rank_pattern": {"a b": 1}}, "unsupported_pattern"),
        ({"rank_pattern": {"(?=a)": 1}}, "unsupported_pattern"),
        ({"rank_pattern": {"(a+)+": 1}}, "unsupported_pattern"),
        ({"rank_pattern": {r"(a)\1": 1}}, "unsupported_pattern"),
        ({"rank_pattern": {".*.*.*x": 1}}, "unsupported_pattern"),
        ({"rank_pattern": {"(.|.)" * 30 + "z": 1}}, "unsupported_pattern"),
        ({"alpha_pattern": {f"q{number}": 1 for number in range(5000)}}, "unsupported_pattern"),
        ({"base_model_name_or_path": {"a": 1}}, "bad_config"),
        ({"base_model_name_or_path": "x" * 1025}, "bad_config"),
        ({"rank_pattern": {f".*{number}": 1 for number in range(65)}}, "unsupported_pattern"),
    ],
)
def test_refused_configurations(tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    assert refusal(tmp_path, **changes).code == code


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "EVA", "orthogonal", "mica", "lora_ga"])
def test_inits_that_leave_a_plain_lora(tmp_path: Path, init: object) -> None:
    assert read(tmp_path, init_lora_weights=init).rank == 4


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"r": NaN}',
        b'{"r": 1e999}',
        b'{"x": "\\ud800"}',
        b"[" * 100_000,
        b"1" * 9000,
        b'{"x": "' + b"y" * (1 << 20) + b'"}',
    ],
    ids=range(10),
)
def test_file_that_is_not_plain_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(InvalidAdapter) as error:
        read_config(tmp_path / "adapter_config.json", 64)
    assert error.value.code == "bad_json"


def test_missing_fields_the_engine_needs(tmp_path: Path) -> None:
    for field in ("r", "lora_alpha", "target_modules"):
        raw = lora_config()
        del raw[field]
        (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
        with pytest.raises(InvalidAdapter, match=f"{field} is None") as error:
            read_config(tmp_path / "adapter_config.json", 64)
        assert error.value.code == "bad_config"


def test_unknown_options_are_told(tmp_path: Path) -> None:
    assert read(tmp_path, use_dora=False, shiny_new=False).warnings == ()
    [warning] = read(tmp_path, shiny_new={"x": 1}, lora_dropout=0.1).warnings
    assert warning.endswith("shiny_new")


def test_the_worst_patterns_that_pass_match_quickly(tmp_path: Path) -> None:
    config = read(tmp_path, rank_pattern={f".*.*{'x' * number}!"[:-1] + "y": 1 for number in range(32)})
    start = time.process_time()
    assert config.rank_of("x" * 100) == 4
    assert time.process_time() - start < 5  # it takes 2 ms; patterns that do not pass take hours


def test_every_known_option_of_the_installed_peft_is_decided_on() -> None:
    lora_config_class = pytest.importorskip("peft").LoraConfig
    from adapters.peft_config import ALL_OPTIONS, HARMLESS_OPTIONS

    fields = set(lora_config_class.__dataclass_fields__)
    assert fields - HARMLESS_OPTIONS - set(ALL_OPTIONS) == set()
