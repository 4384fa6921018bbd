"""The adapter calls of a running server, as Python calls: for the command line and for the end of a training run.

It knows the API's paths and error bodies, and nothing of how the server keeps what it gets.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import quote

import httpx

from adapters import names
from adapters.checksums import sha256_of
from adapters.errors import RemoteRefusal, RemoteUnreachable, StoreError, UploadError
from adapters.tags import NO_TAGS, Changes, Tags
from adapters.targets import Target, to_json
from adapters.upload import HELD_OUT, KEPT

TIMEOUT_S = 120.0
PARTIAL = 206
PIECE_BYTES = 1 << 20
DELETE_TIMEOUT_S = 660.0
"""A deletion waits for running requests, for at most ten minutes."""
TRIAL_TIMEOUT_S, TRIAL_POLL_S = 600.0, 1.0

Opener = Callable[[Path], IO[bytes]]


class Remote:
    """`server`: its URL. Every call gives the answer's JSON; raises RemoteRefusal or RemoteUnreachable."""

    def __init__(self, server: str, api_key: str | None = None) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self.server = server.rstrip("/")
        self._client = httpx.Client(headers=headers, timeout=TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def adapters(self) -> Iterator[dict[str, Any]]:
        """All of them, page by page, in the order of their names."""
        page: dict[str, Any] = {"has_more": True, "last_id": ""}
        while page["has_more"]:
            page = self._call("GET", "", params={"after": page["last_id"]})
            yield from page["data"]

    def overviews(
        self, *, name: str | None = None, tags: Sequence[str] = (), state: str | None = None
    ) -> Iterator[dict[str, Any]]:
        """The same, each with how many versions it has in place of them; `tags`: `key=value` or `key`, all of them."""
        wanted = {"name": name, "tag": list(tags), "state": state}
        params = {"summary": "true", **{key: value for key, value in wanted.items() if value}}
        page: dict[str, Any] = {"has_more": True, "last_id": ""}
        while page["has_more"]:
            page = self._call("GET", "", params={**params, "after": page["last_id"]})
            yield from page["data"]

    def adapter(self, name: str) -> dict[str, Any]:
        return self._call("GET", f"/{_name(name)}")

    def version(self, name: str, ref: str) -> dict[str, Any]:
        return self._call("GET", f"/{_name(name)}/versions/{_part(ref)}")

    def alias(self, name: str, alias: str) -> dict[str, Any]:
        return self._call("GET", f"/{_name(name)}/aliases/{_part(alias)}")

    def edit(self, name: str, version: int | None, tags: Changes) -> dict[str, Any]:
        """The tags of the adapter, or of one version; None takes a key away."""
        path = f"/{_name(name)}" if version is None else f"/{_name(name)}/versions/{version}"
        return self._call("PATCH", path, json={"tags": dict(tags)})

    def set_shadow(self, name: str, alias: str, shadow: Mapping[str, int] | None) -> dict[str, Any]:
        """`version` and `percent`; None: none any more."""
        return self._call("PUT", f"/{_name(name)}/aliases/{_part(alias)}", json={"shadow": shadow})

    def shadow(self, name: str, alias: str) -> dict[str, Any]:
        return self._call("GET", f"/{_name(name)}/aliases/{_part(alias)}/shadow")

    def upload(
        self,
        path: Path,
        name: str,
        *,
        description: str | None = None,
        promote: bool = True,
        max_error: float = 0.0,
        tags: Tags = NO_TAGS,
        opener: Opener = lambda path: path.open("rb"),
    ) -> dict[str, Any]:
        """A directory that PEFT wrote (its files, not its sub-directories), or an archive of one; with their sums.

        Waits until the engine has tried it, for `TRIAL_TIMEOUT_S` at most.
        """
        if not path.exists():
            raise UploadError(
                f"{path} does not exist; give a directory that PEFT's save_pretrained wrote, or an archive"
            )
        files = [path] if path.is_file() else [each for each in sorted(path.iterdir()) if _is_sent(each)]
        if not files:
            raise UploadError(f"{path} holds no files; give a directory that PEFT's save_pretrained wrote")
        sums = {each.name: sha256_of(each) for each in files if each == path or each.name in KEPT}
        form = {"name": name, "promote": str(promote).lower(), "sha256": json.dumps(sums), "max_error": str(max_error)}
        if tags:
            form["tags"] = json.dumps(dict(tags))
        if description is not None:
            form["description"] = description
        with ExitStack() as opened:
            parts = [("files", (each.name, opened.enter_context(opener(each)))) for each in files]
            return self.tried(self._call("POST", "", data=form, files=parts))

    def tried(self, version: dict[str, Any]) -> dict[str, Any]:
        """The version when its trial is over. Raises RemoteRefusal where it failed."""
        deadline = time.monotonic() + TRIAL_TIMEOUT_S
        while version["state"] == "checking" and time.monotonic() < deadline:
            time.sleep(TRIAL_POLL_S)
            version |= self.version(version["name"], str(version["version"]))
        if version["state"] == "failed":
            raise RemoteRefusal(str(version["reason"]), code="probe_failed", status=422)
        return version

    def fetch(self, source: str, name: str, **fields: Any) -> dict[str, Any]:
        """Have the server read a source; the job that does it."""
        return self._call("POST", "", json={"source": source, "name": name, **fields})

    def jobs(self, *, limit: int, state: str | None = None) -> dict[str, Any]:
        """The newest first, one page."""
        wanted = {"limit": limit} | ({} if state is None else {"state": state})
        return self._call("GET", "", under="/v1/jobs", params=wanted)

    def job(self, job_id: str) -> dict[str, Any]:
        return self._call("GET", f"/{_part(job_id)}", under="/v1/jobs")

    def job_events(self, job_id: str) -> dict[str, Any]:
        return self._call("GET", f"/{_part(job_id)}/events", under="/v1/jobs")

    def cancel_job(self, job_id: str) -> dict[str, Any]:
        return self._call("POST", f"/{_part(job_id)}/cancel", under="/v1/jobs")

    def create_file(self, path: Path) -> dict[str, Any]:
        """Rows for training or measuring. Raises UploadError."""
        if not path.is_file():
            raise UploadError(f"{path} is no file; give one with rows, as for training")
        with path.open("rb") as stream:
            form: dict[str, Any] = {"data": {"purpose": "fine-tune"}, "files": {"file": (path.name, stream)}}
            return self._call("POST", "", under="/v1/files", **form)

    def delete_file(self, file_id: str) -> dict[str, Any]:
        return self._call("DELETE", f"/{_part(file_id)}", under="/v1/files")

    def merge(self, wish: Mapping[str, Any]) -> dict[str, Any]:
        """The job that does it."""
        return self._call("POST", "", under="/v1/merges", json=dict(wish))

    def export(self, wish: Mapping[str, Any]) -> dict[str, Any]:
        """The export, which may be there already; its `job` makes it."""
        return self._call("POST", "", under="/v1/exports", json=dict(wish))

    def export_of(self, export_id: str) -> dict[str, Any]:
        return self._call("GET", f"/{_part(export_id)}", under="/v1/exports")

    @contextmanager
    def read_export(self, export_id: str, file: str, sha256: str, offset: int) -> Iterator[Iterator[bytes]]:
        """The bytes of a file from `offset` on, as they come. StoreError where it is another file by now."""
        url = f"{self.server}/v1/exports/{_part(export_id)}/files/{_part(file)}"
        headers = {"range": f"bytes={offset}-", "if-range": f'"{sha256}"'} if offset else {}
        with _reaching(url), self._client.stream("GET", url, headers=headers) as response:
            if not response.is_success:
                response.read()
                raise _refusal(response)
            if offset and response.status_code != PARTIAL:
                raise StoreError(f"{file} has changed since it was begun; delete what is there of it and try again")
            yield response.iter_bytes(PIECE_BYTES)

    def set_alias(self, name: str, alias: str, target: Target) -> dict[str, Any]:
        """To one version, or to several that share its traffic by weight."""
        single = len(target) == 1
        body = {"version": next(iter(target))} if single else {"split": to_json(target)}
        return self._call("PUT", f"/{_name(name)}/aliases/{_part(alias)}", json=body)

    def rollback(self, name: str, alias: str) -> dict[str, Any]:
        return self._call("POST", f"/{_name(name)}/rollback", json={"alias": alias})

    def delete(self, name: str, version: int | None, wait_s: float, *, force: bool = False) -> dict[str, Any]:
        """A version, or the adapter with all of them; `force` cuts off the requests that run."""
        path = f"/{_name(name)}" if version is None else f"/{_name(name)}/versions/{version}"
        params = {"wait_s": wait_s, "force": force}
        return self._call("DELETE", path, params=params, timeout=DELETE_TIMEOUT_S)

    def gc(self, keep: int | None, *, name: str | None, dry_run: bool, wait_s: float) -> dict[str, Any]:
        """Delete what only its age keeps. `keep`: by default what the server is set to."""
        body = {"keep": keep, "name": name, "dry_run": dry_run}
        return self._call("POST", "/gc", json=body, params={"wait_s": wait_s}, timeout=DELETE_TIMEOUT_S)

    def verify(self, *, repair: bool, progress: Callable[[int, int, str], None] | None = None) -> dict[str, Any]:
        """Takes as long as reading all its files; a server tells of no progress."""
        return self._call("POST", "/verify", json={"repair": repair}, timeout=None)

    def files(self, name: str, ref: str) -> list[dict[str, Any]]:
        """Of a version: name, size and SHA-256 of each."""
        return list(self._call("GET", f"/{_name(name)}/versions/{_part(ref)}/files")["data"])

    @contextmanager
    def read(self, name: str, ref: str, file: str) -> Iterator[Iterator[bytes]]:
        """The bytes of a file as they come."""
        url = f"{self.server}/v1/adapters/{_name(name)}/versions/{_part(ref)}/files/{_part(file)}"
        with _reaching(url), self._client.stream("GET", url) as response:
            if not response.is_success:
                response.read()
                raise _refusal(response)
            yield response.iter_bytes(PIECE_BYTES)

    def _call(self, method: str, path: str, *, under: str = "/v1/adapters", **content: Any) -> dict[str, Any]:
        url = f"{self.server}{under}{path}"
        with _reaching(url):
            response = self._client.request(method, url, **content)
        if not response.is_success:
            raise _refusal(response)
        try:
            return dict(response.json())
        except ValueError:
            raise RemoteUnreachable(f"{url} answered something that is not JSON; is that a loraplex server?") from None


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    try:
        yield
    except httpx.InvalidURL as error:
        raise RemoteUnreachable(f"{url} is not a URL: {error}") from error
    except httpx.HTTPError as error:
        raise RemoteUnreachable(
            f"{url} did not answer ({error}); check the address and that the server is up"
        ) from error


def _is_sent(path: Path) -> bool:
    return path.is_file() and path.name != HELD_OUT


def _name(name: str) -> str:
    names.require_name(name)
    return name


def _part(text: str) -> str:
    """Of a path: whatever is typed is a reference, never another path."""
    return quote(text, safe=":")


def _refusal(response: httpx.Response) -> RemoteRefusal:
    try:
        error = response.json()["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, KeyError, TypeError):
        message, code = response.text[:200] or "nothing", None
    return RemoteRefusal(message, code=code, status=response.status_code)
