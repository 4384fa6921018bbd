"""A directory that a job made becomes a version: gate, engine's trial, and a job that can be stopped meanwhile."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path

from adapters.errors import NotServable
from adapters.records import CHECKING, READY
from adapters.registry import Version
from adapters.upload import UploadedFile, UploadOptions
from server.admission import Admission
from server.jobs import Run

TRIAL_S = 5.0


async def take_in(
    admission: Admission, run: Run, name: str, directory: Path, options: UploadOptions
) -> tuple[Version, bool]:
    """The version, and whether it is new. Raises what an upload would, and NotServable where it cannot serve."""
    with ExitStack() as stack:
        files = await asyncio.to_thread(_open_files, directory, stack)
        version, created = await admission.upload(name, files, options, TRIAL_S)
    while version.state == CHECKING:  # its trial waits for an engine that starts, or for other trials
        run.report(**run.progress)
        version = await admission.settled(version, created, TRIAL_S)
    if version.state != READY:
        raise NotServable(f"{version.ref} is {version.state}: {version.reason or 'it cannot be served'}")
    return version, created


def _open_files(directory: Path, stack: ExitStack) -> list[UploadedFile]:
    paths = sorted(path for path in directory.iterdir() if path.is_file())
    return [UploadedFile(path.name, stack.enter_context(path.open("rb"))) for path in paths]
