"""Kill -9 of a server while clients upload, promote, roll back and delete at once: after the next start all that was
acknowledged is there, what was not is there wholly or not at all, and the server serves.

The fake engine, since the API process is what is killed; everything else is the real server on a real socket.
tests/adapters/test_crash_story.py and test_crash.py do the same at numbered instants inside the store and the registry.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import httpx

from adapters.base import BaseModel
from loadtests.synthetic import write_adapter
from server.launch import ServerProcess, launch
from tests.adapters.operations import Place
from tests.adapters.sound import require_sound

ROUNDS = 8
"""At least; more where the machine is so slow that not every kind of work was acknowledged in them."""
KINDS = {"upload", "promote", "delete"}
CLIENTS = 4
MESSAGES = [{"role": "user", "content": "hello"}]
Known = dict[str, Any]
"""What a client knows of its adapter: `versions` (number → digest), and where `default` points."""
GONE: Known = {"versions": {}, "default": None}


def serve(base: BaseModel, data: Path) -> ServerProcess:
    flags = ["--engine", "fake", "--model", str(base.path), "--data-dir", str(data)]
    return launch(flags, data.parent / "server.log")


class Client:
    """Works on one adapter of its own until the server dies. It remembers what it was told, and what it asked last."""

    def __init__(self, name: str, seed: int, adapter: Path) -> None:
        self.name = name
        self._chance = Random(seed)
        self._adapter = adapter
        self.known = dict(GONE)
        self.asked: tuple[str, int] | None = None
        """An action and a version's number, when no answer came."""
        self.done: Counter[str] = Counter()

    def work(self, url: str) -> None:
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            try:
                while True:
                    self._act(client)
            except httpx.TransportError:
                return

    def _act(self, client: httpx.Client) -> None:
        numbers = sorted(self.known["versions"])
        action = self._chance.choice(("upload", "upload", "promote", "promote", "rollback", "delete", "clear"))
        if not numbers or (action == "clear" and self._chance.random() < 0.7):
            action = "upload"
        self.asked = (action, self._chance.choice(numbers or [0]))
        response = getattr(self, f"_{action}")(client, self.asked[1])
        assert response.status_code < 500, response.text
        if response.is_success:
            self.done[action] += 1
            self.known = look(client, self.name)
        self.asked = None

    def _upload(self, client: httpx.Client, _: int) -> httpx.Response:
        content = {file.name: file.read_bytes() for file in sorted(self._adapter.iterdir())}
        content["README.md"] = f"{self.name} {self._chance.random()}".encode()  # so that no blob is there already
        files = [("files", (name, data)) for name, data in content.items()]
        return client.post("/v1/adapters", data={"name": self.name}, files=files)

    def _promote(self, client: httpx.Client, number: int) -> httpx.Response:
        return client.put(f"/v1/adapters/{self.name}/aliases/default", json={"version": number})

    def _rollback(self, client: httpx.Client, _: int) -> httpx.Response:
        return client.post(f"/v1/adapters/{self.name}/rollback")

    def _delete(self, client: httpx.Client, number: int) -> httpx.Response:
        return client.delete(f"/v1/adapters/{self.name}/versions/{number}")

    def _clear(self, client: httpx.Client, _: int) -> httpx.Response:
        return client.delete(f"/v1/adapters/{self.name}")

    def require_kept(self, found: Known) -> None:
        """What is there now is what was known, or that with the last request done, too."""
        if self.asked is None:
            assert found == self.known
            return
        action, number = self.asked
        before, after = self.known["versions"], found["versions"]
        new, gone = after.keys() - before.keys(), before.keys() - after.keys()
        assert all(after[each] == before[each] for each in after.keys() & before.keys())
        assert len(new) <= (action == "upload"), (self.asked, self.known, found)
        assert gone <= {"delete": {number}, "clear": set(before)}.get(action, set()), (self.asked, self.known, found)
        allowed = {self.known["default"], *({"promote": {number}, "rollback": set(before)}.get(action, new))}
        assert found["default"] in (allowed if after else {None}), (self.asked, self.known, found)
        if action == "clear":
            assert not after or found == self.known, "of an adapter that is deleted, everything goes or nothing"
        self.known, self.asked = found, None


def look(client: httpx.Client, name: str) -> Known:
    answer = client.get(f"/v1/adapters/{name}")
    if answer.status_code == 404:
        return dict(GONE)
    shown = answer.raise_for_status().json()
    versions = {each["version"]: each["digest"] for each in shown["versions"]}
    return {"versions": versions, "default": shown["aliases"].get("default")}


def settled(client: httpx.Client) -> None:
    """Wait until what the last server left in the middle is tried or deleted."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        adapters = client.get("/v1/adapters").raise_for_status().json()["data"]
        if all(version["state"] == "ready" for adapter in adapters for version in adapter["versions"]):
            return
        time.sleep(0.05)
    raise AssertionError(f"still not settled: {adapters}")


def test_what_was_acknowledged_outlives_every_kill(base: BaseModel, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, rank=4, seed=1)
    data, chance = tmp_path / "data", Random(0)
    clients = [Client(f"adapter{number}", number, adapter) for number in range(CLIENTS)]
    done, rounds = Counter[str](), 0
    while rounds < ROUNDS or not done.keys() >= KINDS:
        rounds += 1
        with serve(base, data) as server:
            server.wait_ready()
            check(server, clients)
            working = [threading.Thread(target=client.work, args=(server.url,)) for client in clients]
            for thread in working:
                thread.start()
            time.sleep(chance.uniform(0.2, 1.5))
            server.kill()
            for thread in working:
                thread.join()
        done = sum((client.done for client in clients), Counter[str]())
    with serve(base, data) as server:
        server.wait_ready()
        check(server, clients)
        server.stop()
    require_sound(Place(data, store="adapters"))
    print(f"acknowledged in {rounds} rounds: {dict(done)}")


def check(server: ServerProcess, clients: list[Client]) -> None:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        settled(client)
        for each in clients:
            found = look(client, each.name)
            each.require_kept(found)
            if found["default"] is not None:
                answer = client.post("/v1/chat/completions", json={"model": each.name, "messages": MESSAGES})
                assert answer.status_code == 200, answer.text
                assert answer.headers["x-loraplex-version"] == str(found["default"])
