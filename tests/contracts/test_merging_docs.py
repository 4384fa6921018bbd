"""What the README says of `loraplex merge` is what its command line takes."""

from __future__ import annotations

import re
import shlex

import pytest

from adapters.merge.cli import EXIT_CODES, FAILED, STOPPED, WRONG_WORDS, parse
from tests.contracts.test_docs import README, blocks, section

COMMANDS = [
    shlex.split(line, comments=True)
    for block in blocks(README, "sh")
    for line in block.replace("\\\n", "").splitlines()
    if line.startswith("loraplex merge ")
]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 3


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_is_understood(command: list[str]) -> None:
    assert parse(command[2:]).adapters


def test_every_exit_code_is_listed_and_no_other() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \| ", section("## Merging"), re.MULTILINE)}
    assert listed == {0, FAILED, WRONG_WORDS, STOPPED, *(code for _, code, _ in EXIT_CODES)}
