"""Settings out of flags, LORAPLEX_* variables and a TOML file, which come before each other in this order.

The only place that reads them; an unknown key in any of the three is fatal and names the nearest known one.
"""

from __future__ import annotations

import argparse
import difflib
import os
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, InitSettingsSource
from pydantic_settings import PydanticBaseSettingsSource as Source
from pydantic_settings.exceptions import SettingsError as UnreadableValue

from server.errors import SettingsError
from server.settings import ENV_PREFIX, Settings

OTHER_ENV_NAMES = {
    *("LORAPLEX_API_KEY", "LORAPLEX_SERVER", "LORAPLEX_PLUGIN", "LORAPLEX_STEP_THREADS", "LORAPLEX_CACHE_DIR"),
    "LORAPLEX_CONFIG",
}
"""Read elsewhere on purpose: by `loraplex train --server`, by the plugin inside vLLM's processes, and by the tests for
the cache they share with the demo."""
LIST_FLAGS = ("--api-keys", "--engine-args", "--source-protocols", "--source-roots")
"""One value a flag, taken as it is: pydantic-settings would split it at commas and read JSON in it."""


def load_settings(argv: Sequence[str] = ()) -> Settings:
    """Read flags, environment and `--config FILE` (or LORAPLEX_CONFIG). SettingsError says what is wrong."""
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config", type=Path, default=os.environ.get("LORAPLEX_CONFIG"))
    for flag in LIST_FLAGS:
        before.add_argument(flag, action="append")
    known, rest = before.parse_known_args(list(argv))
    lists = {_as_field(flag): given for flag in LIST_FLAGS if (given := getattr(known, _as_field(flag)))}
    _refuse_unknown_flags(rest)
    _refuse_unknown_environment()
    try:
        from_file = _read_toml(known.config) if known.config else {}
        settings = _merge(from_file, rest, lists)
    except ValidationError as error:
        raise SettingsError(_describe(error)) from None
    except UnreadableValue as error:
        raise SettingsError(f'{error}: a list is written as JSON there, for example ["one", "two"]') from None
    if not settings.has_keys and not settings.listens_on_loopback:
        raise SettingsError(
            f"host is {settings.host!r}, but no API key is set: without keys the server listens on loopback only. "
            "Create one with `loraplex keys new --id me --key-file keys.toml --scopes infer,publish,admin` "
            "and start with --key-file keys.toml."
        )
    return settings


def _merge(from_file: dict[str, Any], argv: list[str], lists: dict[str, Any]) -> Settings:
    class FromFile(Settings):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], init_settings: Source, env_settings: Source, *_: Any, **__: Any
        ) -> tuple[Source, ...]:
            flags: CliSettingsSource[BaseSettings] = CliSettingsSource(
                settings_cls, cli_prog_name="loraplex serve", cli_parse_args=argv
            )
            return InitSettingsSource(settings_cls, init_kwargs=lists), flags, env_settings, init_settings

    merged = FromFile(**from_file)
    return Settings.model_construct(**merged.model_dump())


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        data = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise SettingsError(f"configuration file {path} does not exist") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"configuration file {path} is not TOML: {error}") from None
    for key in data:
        _refuse_unknown(key, f"{path}: unknown key {key!r}", str)
    return data


def _refuse_unknown_flags(argv: Sequence[str]) -> None:
    """argparse would refuse them too, but names no near one."""
    for word in argv:
        flag = word.partition("=")[0]
        key = flag.removeprefix("--").removeprefix("no-")
        if flag.startswith("--") and flag != "--help":
            # With an underscore it is unknown, too: one spelling a setting.
            _refuse_unknown(_as_field(key) if "_" not in key else flag, f"unknown flag {flag}", _as_flag)


def _as_field(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _as_flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _as_variable(field: str) -> str:
    return ENV_PREFIX + field.upper()


def _refuse_unknown_environment() -> None:
    for name in os.environ:
        if name.startswith(ENV_PREFIX) and name not in OTHER_ENV_NAMES:
            key = name.removeprefix(ENV_PREFIX).lower()
            _refuse_unknown(key, f"unknown environment variable {name}", _as_variable)


def _refuse_unknown(key: str, complaint: str, spelled: Callable[[str], str]) -> None:
    if key in Settings.model_fields:
        return
    near = difflib.get_close_matches(key, Settings.model_fields, n=1)
    raise SettingsError(complaint + (f"; did you mean {spelled(near[0])}?" if near else ""))


def _describe(error: ValidationError) -> str:
    lines = []
    for issue in error.errors():
        where = ".".join(str(part) for part in issue["loc"]) or "settings"
        got = "" if where.startswith("api_keys") else f" (got {issue['input']!r})"  # a key is never printed
        lines.append(f"{where}: {issue['msg']}{got}" if issue["loc"] else issue["msg"])
    return "; ".join(lines)
