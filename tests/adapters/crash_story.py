"""A registry and its store live on in one place while their process is killed again and again in the middle of what it
does. A twin that is never killed says what should be there.

    python -m tests.adapters.crash_story BASE WORK SEED INSTANTS [DATABASE [BUCKET]]

Before each instant a few operations are chosen and done to the twin, step by step; then a victim does the same in the
place and is killed at one of the moments that `instants` numbers, or at a random time. After that the place must look
as the twin did after what the victim had acknowledged, or after one operation more. Everything that opens anything is a
forked child, so that every step begins with a fresh process. Prints what was met, as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from adapters.base import BaseModel
from adapters.verify import verify
from tests.adapters.instants import Instants
from tests.adapters.operations import Operation, Place, State, choose
from tests.adapters.sound import require_sound

OPERATIONS = 3
TIMED = 0.2
"""The share of instants, the last ones, that come at a time and not at a numbered moment: in mid-commit, too."""


def forked(work: Callable[[int], Any]) -> tuple[int, int]:
    """Process id of a child that does `work`, and the pipe that it may write to. What it returns is written as JSON."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    os.close(reader)
    try:
        os.write(writer, json.dumps(work(writer)).encode())
        os._exit(0)
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)


def heard(reader: int) -> bytes:
    with os.fdopen(reader, "rb") as pipe:
        return pipe.read()


def asked(work: Callable[[int], Any]) -> Any:
    """What `work` returns in a process of its own."""
    child, reader = forked(work)
    answer = heard(reader)
    if os.waitpid(child, 0)[1]:
        raise SystemExit("a process that nobody killed failed")
    return json.loads(answer)


class Story:
    def __init__(self, base: BaseModel, work: Path, seed: int, place: Place) -> None:
        self._base = base
        self._twins = work / "twins"
        self._place = place
        self._chance = Random(seed)
        self._state: State = asked(lambda _: self._inspect(self._twin(0)))
        assert asked(lambda _: self._inspect(place)) == self._state
        self.met: Counter[str] = Counter()
        self.killed = 0

    def instant(self, timed: bool) -> None:
        """A few operations, one kill."""
        states: list[State] = [self._state]
        operations: list[Operation] = []
        moments, seconds = [0], 0.0
        for step in range(OPERATIONS):
            operation = choose(self._chance, states[-1])
            shutil.copytree(self._twin(step).root, self._twin(step + 1).root)
            told = asked(lambda _, step=step, operation=operation: self._do(self._twin(step + 1), operation))  # type: ignore[misc]
            states.append(told["state"])
            operations.append(operation)
            moments += [*([told["opening"]] if step == 0 else []), told["moments"]]
            seconds += told["seconds"]
        done, where = self._kill(operations, 0 if timed else self._moment(moments), self._chance.uniform(0, seconds))
        found = asked(lambda _: self._inspect(self._place))
        reached = next((step for step in (done, done + 1) if step < len(states) and found == states[step]), None)
        if reached is None:
            raise SystemExit(
                f"killed at {where or 'a random time'} in {operations}, {done} acknowledged:\n"
                f"found {json.dumps(found)}\nexpected one of\n" + "\n".join(map(json.dumps, states[done : done + 2]))
            )
        if done < len(operations):
            self.killed += 1
            self.met[f"in {operations[done].kind}"] += 1
            self.met[f"at {where.rpartition(' ')[2] or 'a time'}"] += 1
            self.met["done all the same" if reached > done and states[done] != states[reached] else "not done"] += 1
        self._state = found
        self._keep_twin(reached)

    def _moment(self, moments: list[int]) -> int:
        """In an operation, or in the start before them; a short one is as likely to be hit as a long one."""
        step = self._chance.choice([index for index, count in enumerate(moments) if count])
        return sum(moments[:step]) + self._chance.randint(1, moments[step])

    def _kill(self, operations: list[Operation], moment: int, delay_s: float) -> tuple[int, str]:
        """How many the victim acknowledged, and where it was then."""
        child, reader = forked(lambda writer: self._suffer(operations, moment, writer))
        if moment == 0:
            time.sleep(delay_s)
            os.kill(child, signal.SIGKILL)
        said = heard(reader).decode()
        status = os.waitpid(child, 0)[1]
        assert status == signal.SIGKILL or (status == 0 and said.count("+") == len(operations)), said
        return said.count("+"), said.replace("+", "").removesuffix("null")

    def _suffer(self, operations: list[Operation], moment: int, writer: int) -> None:
        def at(number: int, what: str) -> None:
            if number == moment:
                os.write(writer, what.encode())
                os.kill(os.getpid(), signal.SIGKILL)

        Instants(self._place.root, at).install()
        world = self._place.open(self._base)
        world.recover()
        for operation in operations:
            operation.run(world)
            os.write(writer, b"+")

    def _do(self, place: Place, operation: Operation) -> dict[str, Any]:
        instants = Instants(place.root)
        instants.install()
        world = place.open(self._base)
        world.recover()
        opening, started = instants.count, time.monotonic()
        operation.run(world)
        moments, seconds = instants.count - opening, time.monotonic() - started
        return {"state": world.state(), "opening": opening, "moments": moments, "seconds": seconds}

    def _inspect(self, place: Place) -> State:
        world = place.open(self._base)
        world.recover()
        state = world.state()
        report = verify(world.store, world.registry)
        assert report.sound, report
        assert not report.findings, report
        world.registry.close()
        require_sound(place)
        return state

    def _twin(self, step: int) -> Place:
        """After so many operations."""
        return Place(self._twins / str(step))

    def _keep_twin(self, step: int) -> None:
        kept = self._twins / "kept"
        self._twin(step).root.rename(kept)
        for left in range(OPERATIONS + 1):
            shutil.rmtree(self._twin(left).root, ignore_errors=True)
        kept.rename(self._twin(0).root)


def main(base: str, work: str, seed: str, instants: str, database: str = "", bucket: str = "") -> None:
    if bucket:
        import s3fs

        assert s3fs
    root = Path(work)
    place = Place(root / "place", database or None, bucket or None)
    (root / "twins" / "0").mkdir(parents=True)
    place.root.mkdir()
    story = Story(BaseModel.read(Path(base)), root, int(seed), place)
    while story.killed < int(instants):
        story.instant(timed=story.killed >= int(instants) * (1 - TIMED))
    print(json.dumps(story.met))


if __name__ == "__main__":
    main(*sys.argv[1:])
