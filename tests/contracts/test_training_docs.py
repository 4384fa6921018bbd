"""What the README says of `loraplex train` is what its command line takes."""

from __future__ import annotations

import re
import shlex

import pytest

from adapters.train.cli import EXIT_CODES, FAILED, STOPPED, VERBS, parser
from tests.contracts.test_docs import README, blocks, section

COMMANDS = [
    shlex.split(line, comments=True)
    for block in blocks(README, "sh")
    for line in block.replace("\\\n", "").splitlines()
    if line.startswith("loraplex train ")
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_is_understood(command: list[str]) -> None:
    assert parser().parse_args(command[2:]).verb in VERBS


def test_every_verb_is_shown() -> None:
    assert {command[2] for command in COMMANDS} == set(VERBS)


def test_every_exit_code_is_listed_and_no_other() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \| ", section("## Training"), re.MULTILINE)}
    assert listed == {0, FAILED, STOPPED, *(code for _, code, _ in EXIT_CODES)}
