"""A version's files over HTTP: list, one of them, all as one tar. It takes `publish`: they are somebody's weights."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from adapters.errors import NotFound
from adapters.registry import Version
from server.auth import require
from server.routes.downloads import file_response, tar_response
from server.routes.shapes import file_json
from server.services import Services, Wired

router = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require("publish"))])


@router.get("/{name}/versions/{ref}/files")
async def list_files(name: str, ref: str, wired: Wired) -> dict[str, Any]:
    version, paths = await _files(wired, name, ref)
    data = [file_json(version, path) for path in paths]
    return {"object": "list", "version": version.number, "digest": version.digest, "data": data}


@router.get("/{name}/versions/{ref}/files/{file}")
async def get_file(name: str, ref: str, file: str, wired: Wired, request: Request) -> Response:
    """Its bytes; a part of them with `Range`. The ETag is the file's SHA-256."""
    version, paths = await _files(wired, name, ref)
    found = {path.name: path for path in paths}
    if file not in found:
        raise NotFound(f"{version.ref} has no file {file[:140]!r}; it has {', '.join(sorted(found))}")
    return file_response(request, found[file], version.manifest.files[file])


@router.get("/{name}/versions/{ref}/archive")
async def get_archive(name: str, ref: str, wired: Wired, request: Request) -> Response:
    """A tar with the files at its root, the same bytes each time; an upload takes it as it is."""
    version, paths = await _files(wired, name, ref)
    return tar_response(request, paths, f"{version.adapter}-{version.number}", version.digest)


async def _files(wired: Services, name: str, ref: str) -> tuple[Version, list[Path]]:
    """Those that the manifest lists, on this machine."""
    version = await asyncio.to_thread(wired.registry.resolve, name, ref)
    directory = await wired.fetches.path(version.digest)
    return version, sorted(directory / file for file in version.manifest.files)
