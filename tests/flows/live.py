"""A running server and how the flows talk to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import httpx

from adapters.base import BaseModel
from server.launch import ServerProcess

KEY = "test-key-of-the-flows"


@dataclass(frozen=True)
class Live:
    """A running server and what was uploaded to it."""

    server: ServerProcess
    base: BaseModel

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.server.url, headers=self.headers, timeout=300, trust_env=False)

    def async_client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.server.url, headers=self.headers, timeout=300, trust_env=False)

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {KEY}"}

    def upload(self, name: str, directory: Path) -> httpx.Response:
        files = [("files", (file.name, file.read_bytes())) for file in sorted(directory.iterdir()) if file.is_file()]
        with self.client() as client:
            return client.post("/v1/adapters", data={"name": name}, files=files)
