"""The image is made by the commands that `make setup` runs. No Docker engine is needed: the Dockerfile is parsed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from server.settings_sources import load_settings

ROOT = Path(__file__).parents[2]
TARGETS = ("cpu", "cuda")
INSTALL = re.compile(r"(?:VIRTUAL_ENV=\S+ )?\S+/(?:python -m pip|uv pip) install .+")


@dataclass
class Stage:
    image: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, keyword: str) -> list[str]:
        return [value for found, value in self.instructions if found == keyword]


@cache
def stages() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    for line in joined((ROOT / "Dockerfile").read_text()):
        keyword, _, value = line.partition(" ")
        if keyword == "FROM":
            image, _, name = value.partition(" AS ")
            found[name] = Stage(image)
        else:
            list(found.values())[-1].instructions.append((keyword, value.strip()))
    return found


def joined(text: str) -> list[str]:
    """Lines without comments and continuations, single-spaced."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def lineage(name: str) -> list[Stage]:
    """A stage and those it is built on, the last one first."""
    stage = stages()[name]
    return [stage, *(lineage(stage.image) if stage.image in stages() else [])]


def given(name: str, keyword: str) -> list[str]:
    return [value for stage in lineage(name) for value in stage.all(keyword)]


def installs(scripts: list[str]) -> list[str]:
    """Every pip and uv command in shell scripts, in order."""
    parts = [part.strip() for script in scripts for part in re.split(r"&&|\|\|", script)]
    return [part for part in parts if INSTALL.fullmatch(part)]


@cache
def recipe() -> list[str]:
    text = (ROOT / "Makefile").read_text().replace("$(BIN)", ".venv/bin").replace("$(VENV)", ".venv")
    rules = text[text.index("\n$(READY):") : text.index("touch $(READY)")]
    return installs(joined(rules))


def in_order(name: str) -> list[str]:
    return installs([script for stage in reversed(lineage(f"build-{name}")) for script in stage.all("RUN")])


def test_the_cpu_image_is_made_by_the_recipe_but_for_the_tools_of_developers() -> None:
    assert len(recipe()) == 5
    assert in_order("cpu") == [command.replace("[cpu,train,dev]", "[cpu,train]") for command in recipe()]


def test_the_cuda_image_is_made_by_the_commands_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text().replace("\\\n", " ")
    assert len(in_order("cuda")) == 3
    for command in in_order("cuda"):
        assert re.sub(r" --(quiet|disable-pip-version-check)", "", command) in readme


def test_the_recipes_files_reach_the_image() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    for name in ("adapters", "server", "requirements", "pyproject.toml", "README.md"):
        assert f"!{name}" in ignore
        assert (ROOT / name).exists()


def test_every_base_image_has_a_tag() -> None:
    images = {stage.image for stage in stages().values()} - set(stages())
    assert images == {"python:3.11-slim"}


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_runs_as_root(target: str) -> None:
    assert stages()[target].instructions[-1][0] in ("USER", "ENV")
    (user,) = given(target, "USER")
    assert any(f"useradd --create-home --uid 10001 {user} " in script for script in given(target, "RUN"))


@pytest.mark.parametrize("target", TARGETS)
def test_what_runs_comes_from_its_own_build_stage(target: str) -> None:
    assert stages()[target].all("COPY") == [f"--from=build-{target} /app /app"]


@pytest.mark.parametrize("target", TARGETS)
def test_health_is_readiness_asked_without_curl(target: str) -> None:
    (check,) = given(target, "HEALTHCHECK")
    program, flag, code = json.loads(check.partition(" CMD ")[2])
    assert (program, flag) == ("python", "-c")
    compile(code, "HEALTHCHECK", "exec")
    assert "127.0.0.1:8000/readyz" in code


@pytest.mark.parametrize("target", TARGETS)
def test_it_serves_with_keys_on_the_exposed_port_and_keeps_its_data(target: str) -> None:
    (entry,), (command,) = given(target, "ENTRYPOINT"), given(target, "CMD")
    assert json.loads(entry) == ["loraplex"]
    word, *flags = json.loads(command)
    settings = load_settings(flags)
    assert word == "serve"
    assert (settings.host, settings.has_keys) == ("0.0.0.0", True)
    assert given(target, "EXPOSE") == [str(settings.port)]
    assert given(target, "VOLUME") == [str(settings.data_dir)]
    assert settings.key_file is not None
    assert settings.key_file.parent == settings.data_dir
