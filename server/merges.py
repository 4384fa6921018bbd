"""FLOW merge, as a job: several adapters → a process that combines them → the gate → the engine's trial → a version.

One adapter and its base are an export, whose job is the merge. What can be refused without reading a weight is refused
at once; everything else is the job's error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.ingest import Ingest
from adapters.job_records import QUEUED
from adapters.jobs import Job, Jobs
from adapters.merge.orders import ComposeOrder, recipe_of
from adapters.registry import Registry
from adapters.upload import UploadOptions
from server.admission import Admission
from server.errors import Overloaded
from server.exports import Exports
from server.jobs import Run
from server.merge_fields import OUTTYPE_OF, SHARED, ExportFields, MergeFields
from server.mergeable import mergeable, named, require_merging
from server.merging import Merging
from server.settings import Settings
from server.take_in import take_in

KIND = "merge"
MAX_QUEUED = 1000


class Merges:
    def __init__(
        self,
        jobs: Jobs,
        registry: Registry,
        ingest: Ingest,
        admission: Admission,
        merging: Merging,
        exports: Exports,
        settings: Settings,
    ) -> None:
        self._jobs = jobs
        self._registry = registry
        self._ingest = ingest
        self._admission = admission
        self._merging = merging
        self._exports = exports
        self._settings = settings

    def ask(self, fields: MergeFields, by: str) -> Job:
        """A new job. Raises what is known to be wrong already."""
        require_merging(self._settings)
        if fields.into is None:
            assert fields.adapter is not None
            wanted = {key: value for key, value in fields.model_dump(exclude_unset=True).items() if key in SHARED}
            return self._exports.job_for(ExportFields(format="hf", outtype=OUTTYPE_OF[fields.dtype], **wanted), by)
        versions = [mergeable(self._registry, self._merging.base.name, part.model) for part in fields.adapters]
        recipe_of(self._recipe(fields))
        self._ingest.require_possible(fields.into.name, self._options(fields, by))
        asked = fields.model_dump(mode="json", exclude_unset=True)
        asked["adapters"] = [
            {"weight": part.weight, **named(version)} for part, version in zip(fields.adapters, versions, strict=True)
        ]
        if self._jobs.count(QUEUED, [KIND]) >= MAX_QUEUED:
            raise Overloaded(f"{MAX_QUEUED} merges wait already; try again when some have ended")
        return self._jobs.create(KIND, asked, by=by)

    async def work(self, run: Run) -> Mapping[str, Any]:
        fields = asked(run.job)
        assert fields.into is not None
        given = run.job.params["adapters"]
        adapters = [await self._merging.adapter(run.job, each["ref"], each["digest"]) for each in given]
        order = ComposeOrder(
            adapters=tuple(str(path) for path in adapters),
            base=self._merging.place,
            destination=str(self._merging.out(run.job)),
            recipe=self._recipe(fields),
        )
        done = await self._merging.carry_out(run, order)
        options = self._options(fields, run.job.created_by)
        version, created = await take_in(self._admission, run, fields.into.name, self._merging.out(run.job), options)
        return {
            "name": version.adapter,
            "version": version.number,
            "digest": version.digest,
            "state": version.state,
            "created": created,
            **done,
        }

    def _recipe(self, fields: MergeFields) -> dict[str, Any]:
        return {
            "method": fields.method,
            "weights": [part.weight for part in fields.adapters],
            "density": fields.density,
            "majority_sign_method": fields.majority_sign_method,
            "seed": fields.seed,
            "rank": fields.svd_rank or self._settings.max_lora_rank,
        }

    def _options(self, fields: MergeFields, by: str | None) -> UploadOptions:
        assert fields.into is not None
        into = fields.into
        return UploadOptions(by=by, promote=into.promote, description=into.description, tags=into.tags)


def asked(job: Job) -> MergeFields:
    """With the versions that its references meant when it was made."""
    parts = [{"model": each["ref"], "weight": each["weight"]} for each in job.params["adapters"]]
    return MergeFields.model_validate({**job.params, "adapters": parts})
