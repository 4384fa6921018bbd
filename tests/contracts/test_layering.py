"""Who may import whom, read from the syntax of every module, so that imports inside functions count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGINE_SIDE = ("server/engine/", "server/vllm_plugin/")
RIVALS = "loadtests/rivals/"
SCHEDULER = "server/vllm_plugin/scheduler.py"
"""Imported by vLLM, to which it is given by name."""
VLLM = {"vllm", "vllm_bnb_plugin"}
WEB = {"fastapi", "starlette", "uvicorn"}


def imports(path: Path) -> Iterator[str]:
    """Dotted names; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports would pass by this test"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(package: str) -> list[str]:
    found = [str(path.relative_to(ROOT)) for path in sorted((ROOT / package).rglob("*.py"))]
    assert found
    return found


def roots(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports(ROOT / module)}


@pytest.mark.parametrize("module", modules("adapters"))
def test_the_artifact_side_knows_no_server_and_no_web_framework(module: str) -> None:
    assert roots(module) & ({"server", "loadtests", "tests"} | WEB | VLLM) == set()


@pytest.mark.parametrize("module", modules("server"))
def test_only_the_engine_side_imports_vllm(module: str) -> None:
    if not module.startswith(ENGINE_SIDE):
        assert roots(module) & VLLM == set()
    assert roots(module) & {"loadtests", "tests"} == set()


@pytest.mark.parametrize("module", modules("loadtests"))
def test_the_outside_view_imports_no_engine(module: str) -> None:
    assert "tests" not in roots(module)
    if not module.startswith(RIVALS):
        assert roots(module) & (VLLM | {"torch"}) == set()


@pytest.mark.parametrize("module", modules("server/engine") + modules("server/vllm_plugin"))
def test_the_engine_side_knows_no_registry_and_no_routes(module: str) -> None:
    names = ("app", "wiring", "services", "routes", "generate", "residency", "resolve")
    above = tuple(f"server.{name}" for name in names)
    known = ("adapters.registry", "adapters.store", "adapters.ingest")
    assert [name for name in imports(ROOT / module) if name.startswith((*above, *known))] == []


def test_only_vllm_imports_the_scheduler() -> None:
    name = SCHEDULER.removesuffix(".py").replace("/", ".")
    assert [each for each in modules("server") for found in imports(ROOT / each) if found.startswith(name)] == []


def test_vllm_is_imported_where_it_is_used_and_nowhere_at_the_top() -> None:
    """The engine side is imported by the API process before the environment that vLLM reads is set."""
    for module in set(modules("server/engine") + modules("server/vllm_plugin")) - {SCHEDULER}:
        body = ast.parse((ROOT / module).read_text()).body
        top = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [alias.name for node in top for alias in node.names]
        names += [node.module or "" for node in top if isinstance(node, ast.ImportFrom)]
        assert {name.partition(".")[0] for name in names} & VLLM == set(), module
