"""FLOW fetch, as a job: a source that a publisher names → files → the gate → the engine's trial → a version.

What can be refused without asking the source is refused at once; everything else is the job's error, with the code and
the message that an upload of the same files would have had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field

from adapters.ingest import Ingest
from adapters.job_records import QUEUED
from adapters.jobs import Job, Jobs
from adapters.registry import Version
from adapters.sources.address import Policy, parse
from adapters.sources.fetch import Progress, admit
from adapters.upload import UploadLimits
from server.admission import Admission
from server.errors import Overloaded
from server.jobs import Run
from server.upload_fields import UploadFields, read_fields

KIND = "fetch"
MAX_QUEUED = 1000


class SourceFields(UploadFields):
    """The JSON body of `POST /v1/adapters`."""

    source: str = Field(max_length=2000)
    wait_s: float = Field(default=0.0, ge=0, le=600)


class Intake:
    def __init__(
        self, jobs: Jobs, ingest: Ingest, admission: Admission, policy: Policy, limits: UploadLimits, timeout_s: float
    ) -> None:
        self._jobs = jobs
        self._ingest = ingest
        self._admission = admission
        self._policy = policy
        self._limits = limits
        self._timeout_s = timeout_s

    def ask(self, fields: SourceFields, by: str) -> Job:
        """A new job. Raises what is known to be wrong already."""
        self._policy.require(parse(fields.source))
        self._ingest.require_possible(fields.name, fields.options(by))
        if self._jobs.count(QUEUED, [KIND]) >= MAX_QUEUED:
            raise Overloaded(f"{MAX_QUEUED} fetches wait already; try again when some have ended")
        return self._jobs.create(KIND, fields.model_dump(mode="json", exclude={"wait_s"}), by=by)

    async def work(self, run: Run) -> Mapping[str, Any]:
        version, created = await run.in_thread(lambda: self._take_in(run))
        version = await self._admission.settled(version, created)
        return {
            "name": version.adapter,
            "version": version.number,
            "digest": version.digest,
            "state": version.state,
            "created": created,
        }

    def _take_in(self, run: Run) -> tuple[Version, bool]:
        fields = read_fields(run.job.params, SourceFields)
        source = parse(fields.source)
        options = replace(fields.options(run.job.created_by), probe=self._admission.tries)
        run.event(f"reading {source.shown}", attempt=run.job.attempts)

        def watch(progress: Progress) -> None:
            another = progress.file != run.progress.get("file")
            run.report(bytes=progress.bytes, total_bytes=progress.total_bytes, file=progress.file)
            if another:
                run.event(f"reading {progress.file}", total_bytes=progress.total_bytes)

        version, created = admit(
            source, fields.name, self._ingest, self._policy, self._limits, options, watch, self._timeout_s
        )
        run.event(f"{version.ref} is registered" if created else f"{version.ref} is registered already: the same files")
        return version, created
