from __future__ import annotations

import hashlib
import hmac
import stat
from pathlib import Path

import pytest

from server.errors import SettingsError
from server.keys import Caller, Key, KeyRing, create_key, load_keys

SECRET = "lpx-0123456789abcdef"
DIGEST = hashlib.sha256(SECRET.encode()).hexdigest()


def test_a_new_key_is_printed_once_and_kept_as_a_hash(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    secret = create_key(path, "ann", ["infer"])
    assert secret.startswith("lpx-")
    assert secret not in path.read_text()
    assert hashlib.sha256(secret.encode()).hexdigest() in path.read_text()


def test_the_key_file_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    create_key(path, "ann", ["infer"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_keys_are_appended_and_each_identifies_its_caller(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    ann, bob = create_key(path, "ann", ["infer"]), create_key(path, "bob", ["publish", "infer"])
    ring = load_keys([], path)
    assert len(ring) == 2
    assert ring.identify(ann) == Caller("ann", frozenset({"infer"}))
    assert ring.identify(bob) == Caller("bob", frozenset({"infer", "publish"}))
    assert ring.identify(ann + "x") is None
    assert ring.identify("") is None


def test_an_id_names_one_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    create_key(path, "ann", ["infer"])
    before = path.read_text()
    with pytest.raises(SettingsError, match="already holds a key with the id 'ann'"):
        create_key(path, "ann", ["admin"])
    assert path.read_text() == before


def test_an_id_cannot_write_into_the_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    odd = 'ann"\nscopes = ["admin"]\n# \\'
    secret = create_key(path, odd, ["infer"])
    assert load_keys([], path).identify(secret) == Caller(odd, frozenset({"infer"}))


@pytest.mark.parametrize("scopes", [[], ["root"], ["infer", "root"], [""]])
def test_scopes_are_checked(tmp_path: Path, scopes: list[str]) -> None:
    with pytest.raises(SettingsError, match="expected some of"):
        create_key(tmp_path / "keys.toml", "ann", scopes)
    assert not (tmp_path / "keys.toml").exists()


def test_a_key_in_the_settings() -> None:
    ring = load_keys([f"infer+publish:{SECRET}"], None)
    assert ring.identify(SECRET) == Caller("settings-1", frozenset({"infer", "publish"}))


def test_a_secret_may_contain_colons() -> None:
    assert load_keys(["infer:aa:bb:cc:dd:ee:ff"], None).identify("aa:bb:cc:dd:ee:ff") is not None


@pytest.mark.parametrize("text", ["infer", SECRET, "infer:tooshort", f"root:{SECRET}", f":{SECRET}"])
def test_a_bad_key_in_the_settings_is_fatal_and_not_printed(text: str) -> None:
    with pytest.raises(SettingsError, match=r"api_keys\[1\]") as stopped:
        load_keys([text], None)
    assert SECRET not in str(stopped.value)
    assert "tooshort" not in str(stopped.value)


@pytest.mark.parametrize(
    "content",
    [
        "key = 3",
        "[[key]]\nid = 'ann'",
        "[[key]",
        "[[keys]]\nid = 'ann'",
        f"[[key]]\nid = 'ann'\nsha256 = '{SECRET}'\nscopes = ['infer']",
        f"[[key]]\nid = 'ann'\nsha256 = '{DIGEST.upper()}'\nscopes = ['infer']",
        f"[[key]]\nid = 'ann'\nsha256 = '{DIGEST}'\nscopes = 'infer'",
        f"[[key]]\nid = 'ann'\nsha256 = '{DIGEST}'\nscopes = []",
        "[[key]]\nid = 'ann'\nsha256 = 7\nscopes = ['infer']",
        "\udcff",
    ],
)
def test_a_damaged_key_file_is_fatal(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(SettingsError, match=r"keys\.toml"):
        load_keys([], path)


@pytest.mark.parametrize("content", ["", "key = []"])
def test_a_key_file_without_keys_does_not_let_everyone_in(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(content)
    with pytest.raises(SettingsError, match=r"keys\.toml"):
        load_keys([], path)


def test_a_missing_key_file_is_fatal(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="does not exist"):
        load_keys([], tmp_path / "keys.toml")


def test_admin_includes_the_other_scopes_and_no_other_does() -> None:
    root, ann = Caller("root", frozenset({"admin"})), Caller("ann", frozenset({"publish"}))
    assert [root.may("infer"), root.may("publish"), root.may("admin")] == [True, True, True]
    assert [ann.may("infer"), ann.may("publish"), ann.may("admin")] == [False, True, False]


def test_every_stored_digest_is_compared_whichever_one_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    same = hmac.compare_digest

    def watched(stored: str, given: str) -> bool:
        compared.append(stored)
        return same(stored, given)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    digests = [hashlib.sha256(name.encode()).hexdigest() for name in ("one", "two", "three")]
    ring = KeyRing(Key(digest[:4], digest, frozenset({"infer"})) for digest in digests)
    assert ring.identify("one") is not None
    assert compared == digests
