"""What the README says of `loraplex merge` and `loraplex fidelity` is what their command lines take."""

from __future__ import annotations

import re
import shlex

import pytest

from adapters.merge.cli import EXIT_CODES, parse
from adapters.merge.ending import FAILED, STOPPED, WRONG_WORDS
from adapters.merge.fidelity_cli import parser as fidelity_parser
from server.adapters_cli import merging
from tests.contracts.test_docs import README, blocks, section


def commands(word: str) -> list[list[str]]:
    lines = [line for block in blocks(README, "sh") for line in block.replace("\\\n", "").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(f"loraplex {word} ")]


COMMANDS, MEASURING = commands("merge"), commands("fidelity")


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 3
    assert len(MEASURING) > 1


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_is_understood(command: list[str]) -> None:
    read = merging.parse_merge if merging.is_meant(command) else parse
    assert read(command[2:]).adapters


def test_an_export_that_a_server_makes_is_understood() -> None:
    asked = [command for command in commands("export") if merging.is_meant(command)]
    assert [merging.parse_export(command[2:]).adapter for command in asked] == ["mine@1"]


@pytest.mark.parametrize("command", MEASURING, ids=" ".join)
def test_a_measurement_is_understood(command: list[str]) -> None:
    assert fidelity_parser().parse_args(command[2:]).base


def test_every_exit_code_is_listed_and_no_other() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \| ", section("## Merging"), re.MULTILINE)}
    assert listed == {0, FAILED, WRONG_WORDS, STOPPED, *(code for _, code, _ in EXIT_CODES)}
