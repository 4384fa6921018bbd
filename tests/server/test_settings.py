from __future__ import annotations

import dataclasses
from pathlib import Path

import pydantic
import pytest

from server.errors import SettingsError
from server.settings import Settings
from server.settings_sources import load_settings


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "loraplex.toml"
    path.write_text("max_loras = 3\n")
    return path


def test_flag_beats_environment_beats_file_beats_default(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings([]).max_loras is None
    assert load_settings(["--config", str(toml)]).max_loras == 3
    monkeypatch.setenv("LORAPLEX_MAX_LORAS", "5")
    assert load_settings(["--config", str(toml)]).max_loras == 5
    assert load_settings(["--config", str(toml), "--max-loras", "6"]).max_loras == 6


def test_the_file_may_be_named_by_the_environment(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_CONFIG", str(toml))
    assert load_settings([]).max_loras == 3


def test_a_default_given_as_a_flag_still_beats_the_file(toml: Path) -> None:
    assert load_settings(["--config", str(toml), "--max-loras", "4"]).max_loras == 4


def test_an_unknown_flag_is_fatal_and_names_the_near_one() -> None:
    with pytest.raises(SettingsError, match=r"unknown flag --max-lora; did you mean --max-loras\?"):
        load_settings(["--max-lora=3"])


def test_an_unknown_variable_is_fatal_and_names_the_near_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_MAX_LORA", "3")
    with pytest.raises(
        SettingsError, match=r"unknown environment variable LORAPLEX_MAX_LORA; did you mean LORAPLEX_MAX_LORAS\?"
    ):
        load_settings([])


def test_an_unknown_key_in_the_file_is_fatal_and_names_the_near_one(tmp_path: Path) -> None:
    path = tmp_path / "loraplex.toml"
    path.write_text("max_lora = 3\n")
    with pytest.raises(SettingsError, match=r"unknown key 'max_lora'; did you mean max_loras\?"):
        load_settings(["--config", str(path)])


def test_a_table_in_the_file_is_an_unknown_key(tmp_path: Path) -> None:
    path = tmp_path / "loraplex.toml"
    path.write_text("[server]\nport = 1\n")
    with pytest.raises(SettingsError, match="unknown key 'server'"):
        load_settings(["--config", str(path)])


@pytest.mark.parametrize("flag", ["--max_loras=3", "--conf=x", "-p"])
def test_flags_have_one_spelling(flag: str) -> None:
    with pytest.raises((SettingsError, SystemExit)) as stopped:
        load_settings([flag])
    assert not (isinstance(stopped.value, SystemExit) and stopped.value.code == 0)


def test_names_read_by_other_parts_are_not_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_PLUGIN", "0")
    monkeypatch.setenv("LORAPLEX_CACHE_DIR", "somewhere")
    load_settings([])


@pytest.mark.parametrize(
    ("content", "complaint"), [(None, "does not exist"), ("max_loras =", "is not TOML")], ids=["missing", "broken"]
)
def test_a_file_that_cannot_be_read_is_fatal(tmp_path: Path, content: str | None, complaint: str) -> None:
    path = tmp_path / "loraplex.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError, match=complaint):
        load_settings(["--config", str(path)])


def test_a_wrong_value_is_named_with_what_was_got() -> None:
    with pytest.raises(SettingsError, match=r"max_loras: .*valid integer.*\(got 'many'\)"):
        load_settings(["--max-loras", "many"])


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--port", "65536"), ("--max-loras", "0"), ("--max-lora-rank", "12"), ("--max-model-len", "8")],
)
def test_values_out_of_range_are_fatal(flag: str, value: str) -> None:
    with pytest.raises((SettingsError, SystemExit)) as stopped:
        load_settings([flag, value])
    assert not (isinstance(stopped.value, SystemExit) and stopped.value.code == 0)


def test_a_list_in_the_environment_that_is_not_json_says_how_to_write_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_API_KEYS", "infer:a-secret-that-nobody-may-see")
    with pytest.raises(SettingsError, match="JSON") as stopped:
        load_settings([])
    assert "a-secret-that-nobody-may-see" not in str(stopped.value)


def test_a_key_of_the_wrong_type_is_not_printed(tmp_path: Path) -> None:
    path = tmp_path / "loraplex.toml"
    path.write_text('api_keys = "infer:a-secret-that-nobody-may-see"\n')
    with pytest.raises(SettingsError, match="api_keys") as stopped:
        load_settings(["--config", str(path)])
    assert "a-secret-that-nobody-may-see" not in str(stopped.value)


def test_list_flags_repeat_and_are_taken_as_they_are() -> None:
    settings = load_settings(['--engine-args=--override={"a": 1, "b": 2}', "--engine-args=--block-size=64"])
    assert settings.engine_args == ('--override={"a": 1, "b": 2}', "--block-size=64")


def test_the_engine_must_hold_what_one_batch_can_mix() -> None:
    with pytest.raises(SettingsError, match="max_resident_adapters is 2, but max_loras is 4"):
        load_settings(["--max-resident-adapters", "2", "--max-loras", "4"])


@pytest.mark.parametrize(
    ("flags", "slots", "resident"),
    [
        ([], 16, 64),
        (["--max-loras", "80"], 80, 80),
        (["--max-resident-adapters", "5"], 5, 5),
        (["--max-num-seqs", "3"], 3, 64),
        (["--max-num-seqs", "100"], 16, 64),
        (["--device", "cuda"], 4, 64),
    ],
)
def test_slots_and_resident_adapters_by_default(flags: list[str], slots: int, resident: int) -> None:
    settings = load_settings(flags)
    assert (settings.slots, settings.resident_adapters) == (slots, resident)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_without_keys_loopback_is_allowed(host: str) -> None:
    assert load_settings(["--host", host]).listens_on_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "loraplex.example", ""])
def test_without_keys_nothing_but_loopback_is_allowed(host: str) -> None:
    with pytest.raises(SettingsError, match="without keys the server listens on loopback only"):
        load_settings(["--host", host])


@pytest.mark.parametrize("flag", ["--api-keys=infer:0123456789abcdef", "--key-file=keys.toml"])
def test_with_keys_any_address_is_allowed(flag: str) -> None:
    assert load_settings(["--host", "0.0.0.0", flag]).host == "0.0.0.0"


def test_settings_are_frozen() -> None:
    settings = load_settings([])
    with pytest.raises((pydantic.ValidationError, dataclasses.FrozenInstanceError)):
        settings.port = 1
    assert settings.port == 8000


def test_the_registry_lies_in_the_data_directory_unless_a_database_is_named(tmp_path: Path) -> None:
    assert load_settings(["--data-dir", str(tmp_path)]).registry_url == f"sqlite:///{tmp_path}/registry.db"
    assert load_settings(["--database-url", "postgresql://db/lora"]).registry_url == "postgresql://db/lora"


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_says_what_it_is(name: str) -> None:
    assert (Settings.model_fields[name].description or "").endswith((".", ").", "`"))


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load_settings(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert [name for name in Settings.model_fields if f"--{name.replace('_', '-')}" not in shown] == []
