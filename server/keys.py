"""API keys: made, hashed, stored, looked up. Knows no HTTP and keeps no key in clear.

A key is 32 random bytes, so one SHA-256 is enough to store it: there is nothing to guess, and no salt is needed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from server.errors import SettingsError

Scope = Literal["infer", "publish", "admin"]
SCOPES: frozenset[Scope] = frozenset(get_args(Scope))
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Key:
    """One key as it is kept: `digest` is the SHA-256 hex of the secret."""

    id: str
    digest: str
    scopes: frozenset[Scope]


@dataclass(frozen=True)
class Caller:
    """Who is asking. `admin` includes the other scopes."""

    id: str
    scopes: frozenset[Scope]

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes


ANYONE_ON_LOOPBACK = Caller("anonymous", SCOPES)


class KeyRing:
    """The keys of a running server. An empty ring means: no authentication (loopback only, see settings)."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = tuple(keys)

    def __len__(self) -> int:
        return len(self._keys)

    def identify(self, secret: str) -> Caller | None:
        """The caller of a secret. Every stored digest is compared, each in constant time."""
        digest = _digest(secret)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = Caller(key.id, key.scopes)
        return found


def load_keys(in_settings: Iterable[str], key_file: Path | None) -> KeyRing:
    """Keys from `scope+scope:secret` settings and from a key file. SettingsError names what is wrong, never a key."""
    keys = [_parse_setting(text, number) for number, text in enumerate(in_settings, 1)]
    if key_file is not None:
        keys += _read_file(key_file)
        if not keys:
            # An empty ring would let everyone in, on an address that was chosen in the belief that there are keys.
            raise SettingsError(f"key file {key_file} holds no key; make one with `loraplex keys new`")
    return KeyRing(keys)


def create_key(key_file: Path, key_id: str, scopes: Iterable[str]) -> str:
    """Append a new key's digest to `key_file` (mode 0600) and return its secret: the only time it is seen."""
    checked = _check_scopes(scopes, f"key {key_id!r}")
    known = _read_file(key_file) if key_file.exists() else []
    if any(key.id == key_id for key in known):
        raise SettingsError(f"{key_file} already holds a key with the id {key_id!r}; choose another --id")
    secret = "lpx-" + secrets.token_urlsafe(32)
    lines = [_render(key) for key in [*known, Key(key_id, _digest(secret), checked)]]
    staged = key_file.with_name(key_file.name + ".new")
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write("\n".join(lines))
        file.flush()
        os.fsync(file.fileno())
    staged.replace(key_file)
    return secret


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _render(key: Key) -> str:
    scopes = ", ".join(f'"{scope}"' for scope in sorted(key.scopes))
    return f'[[key]]\nid = {json.dumps(key.id)}\nsha256 = "{key.digest}"\nscopes = [{scopes}]\n'


def _parse_setting(text: str, number: int) -> Key:
    scopes, found, secret = text.partition(":")
    if not found or len(secret) < 16:
        raise SettingsError(
            f"api_keys[{number}] is not `scope+scope:key` with a key of at least 16 characters, "
            "for example `infer+publish:lpx-…`"
        )
    return Key(f"settings-{number}", _digest(secret), _check_scopes(scopes.split("+"), f"api_keys[{number}]"))


def _read_file(path: Path) -> list[Key]:
    try:
        entries = tomllib.loads(path.read_text())["key"]
        return [_parse_entry(entry, path) for entry in entries]
    except FileNotFoundError:
        raise SettingsError(f"key file {path} does not exist; `loraplex keys new` makes one") from None
    except OSError as error:
        raise SettingsError(f"key file {path} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"key file {path} is damaged: {error!r}; expected [[key]] with id, sha256, scopes"
        ) from None


def _parse_entry(entry: dict[str, Any], path: Path) -> Key:
    if not DIGEST.fullmatch(entry["sha256"]):
        raise ValueError(f"sha256 of key {entry['id']!r} is not 64 lower-case hex digits")
    return Key(str(entry["id"]), entry["sha256"], _check_scopes(entry["scopes"], f"{path}: {entry['id']}"))


def _check_scopes(scopes: Iterable[str], where: str) -> frozenset[Scope]:
    wanted = frozenset(scopes)
    unknown = sorted(wanted - SCOPES)
    if unknown or not wanted:
        raise SettingsError(f"{where}: scopes are {sorted(wanted)}, expected some of {sorted(SCOPES)}")
    return wanted  # type: ignore[return-value]
