"""`hf://org/name@revision/folder`: a model repository, by the hub's own client. Reads the files that are kept and none
of the others, all of one commit. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to that client.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import unquote

from adapters.errors import SourceError, SourceForbidden, SourceNotFound, SourceUnavailable
from adapters.sources.address import Policy, Source
from adapters.sources.remote_file import SILENCE_S, Chunks, Listing, Readable, RemoteFile, require_archive
from adapters.upload import KEPT

PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
PLACE = re.compile(rf"({PART}/{PART})(?:@(refs/[a-z]+/[^/]+|[^/@]+))?(?:/(.+?))?/?")
OTHER_KINDS = ("datasets", "spaces", "buckets", "models")


@dataclass(frozen=True)
class Place:
    repository: str
    revision: str | None
    path: str
    """Folder or archive in the repository; empty for its root."""


def place_of(source: Source) -> Place:
    match = PLACE.fullmatch(source.rest)
    if match is None or match[1].partition("/")[0] in OTHER_KINDS:
        raise SourceError(
            f"source {source.shown[:200]!r} names no model repository; expected hf://org/name, "
            "hf://org/name@revision or hf://org/name@revision/folder"
        )
    return Place(match[1], None if match[2] is None else unquote(match[2]), match[3] or "")


@contextmanager
def listing(source: Source, _: Policy) -> Iterator[Listing]:
    place = place_of(source)
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise SourceUnavailable(
            "this server runs with HF_HUB_OFFLINE and reads nothing from the hub; upload the files, or unset it there",
            code="hub_offline",
        )
    with _reporting(place):
        # One request for the commit and all sizes; the calls that list a folder have no time-out.
        info = HfApi().model_info(place.repository, revision=place.revision, files_metadata=True, timeout=SILENCE_S)
    commit = str(info.sha)
    files = [
        RemoteFile(
            name,
            sibling.size,
            partial(_opened, place, commit, sibling.rfilename),
            None if sibling.lfs is None else sibling.lfs.sha256,
        )
        for name, sibling in _wanted(place, info.siblings or []).items()
    ]
    at = f"hf://{place.repository}@{commit}" + (f"/{place.path}" if place.path else "")
    yield Listing(tuple(files), {"url": at, "asked": source.shown, "commit": commit})


def _wanted(place: Place, siblings: list[Any]) -> dict[str, Any]:
    """Name here → the file there."""
    there = {sibling.rfilename: sibling for sibling in siblings}
    if place.path in there:
        return {require_archive(place.path.rpartition("/")[2]): there[place.path]}
    folder = f"{place.path}/" if place.path else ""
    if folder and not any(name.startswith(folder) for name in there):
        raise SourceNotFound(f"there is no folder {place.path[:200]!r} in {place.repository}; check the address")
    return {name: there[folder + name] for name in sorted(KEPT) if folder + name in there}


@contextmanager
def _opened(place: Place, commit: str, path: str) -> Iterator[Readable]:
    """One stream; the hub's own downloads cannot be stopped, and its file system lists the whole folder first."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    url = hf_hub_url(place.repository, path, revision=commit)
    headers = {**build_hf_headers(), "accept-encoding": "identity"}
    with _reporting(place), get_session().stream("GET", url, headers=headers, timeout=SILENCE_S) as response:
        hf_raise_for_status(response)
        yield Chunks(response.iter_raw())


@contextmanager
def _reporting(place: Place) -> Iterator[None]:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError:
        raise SourceForbidden(
            f"the hub keeps {place.repository} behind a form; accept it, and start the server with HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise SourceNotFound(f"{place.repository} has no revision {str(place.revision)[:80]!r}") from None
    except RepositoryNotFoundError:
        raise SourceNotFound(
            f"the hub shows this server no repository {place.repository}; check the name, or start the server with an "
            "HF_TOKEN that may read it"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise SourceForbidden(f"the hub answers {status} for {place.repository}; check HF_TOKEN") from None
        raise SourceUnavailable(f"the hub answers {status} for {place.repository}; try again") from None
