"""What the README says is what the code does: tables, tree, routes, metrics, commands."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from server import problems
from server.cli import main
from server.launch import ServerProcess, launch
from server.settings_sources import load_settings
from tests.adapters.factories import AdapterFiles, write_base
from tests.contracts import tables
from tests.server.harness import KEYS, WITH_KEYS, adapter_files, as_parts, world

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PACKAGES = ("adapters", "server", "loadtests")
ROUTE = re.compile(r"^\| (GET|POST|PUT|PATCH|DELETE) \| `([^`]+)` \| (infer|publish|admin|none) \|", re.MULTILINE)
METRIC = re.compile(r"^\| `(loraplex_\w+)` \| (\w+) \|", re.MULTILINE)


def section(title: str) -> str:
    """The text under a heading, down to the next one of its level or higher."""
    level, start = "#" * title.count("#"), README.index(f"\n{title}\n")
    following = re.compile(rf"^#{{1,{len(level)}}} ", re.MULTILINE).search(README, start + len(title) + 2)
    return README[start : following.start() if following else None]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_tables_are_those_of_the_code() -> None:
    assert tables.rendered(README) == README, "write them anew with `python -m tests.contracts.tables`"


@pytest.mark.parametrize("status", sorted(set(problems.STATUS.values())))
def test_every_status_says_what_to_do(status: int) -> None:
    assert len(re.findall(rf"^\| {status} \| [A-Z]", section("## Errors"), re.MULTILINE)) == 1


def narrower_codes() -> set[str]:
    """Every `code="…"` in the two packages."""
    trees = [ast.parse(path.read_text()) for package in ("adapters", "server") for path in modules(package)]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    given = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "code"]
    return {value.value for value in given if isinstance(value, ast.Constant) and isinstance(value.value, str)}


def test_every_code_of_an_error_is_named() -> None:
    codes = narrower_codes()
    assert "version_in_use" in codes
    assert [code for code in sorted(codes) if f"`{code}`" not in section("## Errors")] == []


def modules(package: str) -> list[Path]:
    return [path for path in sorted((ROOT / package).rglob("*.py")) if path.name != "__init__.py"]


@cache
def tree() -> set[str]:
    """Every file that the tree prints, as a path."""
    found, folder = set(), ""
    for line in blocks(section("## The tree"), "text")[0].splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            found.add(folder + name)
        else:
            folder = name
    return found


def test_the_tree_names_every_module() -> None:
    there = {str(path.relative_to(ROOT)) for package in PACKAGES for path in modules(package)}
    assert there - tree() == set()


def test_the_tree_names_nothing_that_is_not_there() -> None:
    assert len(tree()) > 70
    assert [name for name in sorted(tree()) if not (ROOT / name).exists()] == []


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    root = tmp_path_factory.mktemp("keyed")
    with world(write_base(root / "tiny"), root / "data", **WITH_KEYS).client() as client:
        yield client


def listed_routes() -> dict[tuple[str, str], str]:
    return {(method, path): scope for method, path, scope in ROUTE.findall(section("## HTTP surface"))}


def test_every_route_is_listed_and_no_other(keyed: TestClient) -> None:
    document: Any = keyed.app.openapi()  # type: ignore[attr-defined]
    served = {(method.upper(), path) for path, verbs in document["paths"].items() for method in verbs}
    assert served | {("GET", "/openapi.json")} == set(listed_routes())


@pytest.mark.parametrize(("route", "scope"), listed_routes().items(), ids=lambda value: "".join(value))
def test_the_listed_scope_is_the_one_that_is_needed(keyed: TestClient, route: tuple[str, str], scope: str) -> None:
    def refused(key: str | None) -> bool:
        headers = {"authorization": f"Bearer {KEYS[key]}"} if key else {}
        return keyed.request(route[0], re.sub(r"{\w+}", "1", route[1]), headers=headers).status_code in (401, 403)

    assert refused(None) == (scope != "none")
    assert [key for key in KEYS if refused(key)] == [
        key for key in KEYS if key not in (scope, "admin") and scope != "none"
    ]


def test_every_metric_is_listed_and_no_other(tmp_path: Path) -> None:
    with world(write_base(tmp_path / "tiny"), tmp_path / "data").client() as client:
        page = client.get("/metrics").text
    served = re.findall(r"^# TYPE (loraplex_\w+) (\w+)$", page, re.MULTILINE)
    assert {each for each in served if not each[0].endswith("_created")} == set(METRIC.findall(section("## Metrics")))
    assert "vllm:lora_requests_info" in page


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_every_make_target_named_here_exists() -> None:
    named = set(re.findall(r"`make ([a-z-]+)", README)) | set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))
    assert named - make_targets() == set()


def test_every_make_target_is_named() -> None:
    assert [target for target in sorted(make_targets()) if f"`make {target}`" not in section("## Development")] == []


def test_the_changelog_knows_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_licence_is_the_one_that_the_project_declares() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"] == "Apache-2.0"
    licence = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in licence
    assert "The loraplex authors" in licence


@pytest.fixture(scope="module")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """What the quick start speaks to: the base's name, the adapter `pirate`; the engine is the fake one."""
    root = tmp_path_factory.mktemp("quickstart")
    flags = ["--engine", "fake", "--model", str(write_base(root / "tiny")), "--data-dir", str(root / "data")]
    with launch([*flags, "--served-model-name", "SmolLM2-135M-Instruct"], root / "server.log") as server:
        server.wait_ready(300)
        upload(server, "pirate")
        yield server


def upload(server: ServerProcess, name: str) -> None:
    files = as_parts(adapter_files(seed=1).files())
    httpx.post(f"{server.url}/v1/adapters", data={"name": name}, files=files, trust_env=False).raise_for_status()


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_curl_commands_of_the_quick_start_work(demo_server: ServerProcess, tmp_path: Path) -> None:
    AdapterFiles().write(tmp_path / "my-adapter")
    scripts = [block for block in blocks(section("## Quick start"), "sh") if "curl" in block]
    assert len(scripts) == 2
    for script in scripts:
        script = script.replace("http://127.0.0.1:8000", demo_server.url).replace("curl ", "curl --fail --silent ")
        ended = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr + ended.stdout


def test_the_python_of_the_quick_start_works(demo_server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    upload(demo_server, "mine")
    (program,) = blocks(section("## Quick start"), "python")
    exec(compile(program.replace("http://127.0.0.1:8000", demo_server.url), "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("[mine@")


def test_the_key_commands_work(tmp_path: Path) -> None:
    made, served = [line.partition("#")[0].split() for line in blocks(section("### Keys"), "sh")[0].splitlines()]
    at = {"keys.toml": str(tmp_path / "keys.toml")}
    assert main([at.get(word, word) for word in made[1:]]) == 0
    assert load_settings([at.get(word, word) for word in served[2:]]).has_keys


def test_setting_up_by_hand_is_what_make_does() -> None:
    """Word for word but for `--quiet` and its like, so that the two cannot drift apart."""
    recipe = words((ROOT / "Makefile").read_text().replace("$(BIN)", ".venv/bin").replace("$(VENV)", ".venv"))
    by_hand = [words(line) for line in blocks(section("## Setting up"), "sh")[0].replace("\\\n", "").splitlines()]
    assert len(by_hand) == 5
    for command in by_hand[1:]:
        assert command in recipe


def words(script: str) -> str:
    quiet = re.sub(r"--(quiet|disable-pip-version-check) ", "", script.replace("\\\n", ""))
    return " ".join(quiet.split())
