"""FLOW merge, as a job: an adapter and its base → one model, measured, at hand for an engine; or several adapters → a
process that combines them → the gate → the engine's trial → a version.

What can be refused without reading a weight is refused at once; everything else is the job's error.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.errors import NotFound
from adapters.ingest import Ingest
from adapters.job_records import QUEUED
from adapters.jobs import Job, Jobs
from adapters.merge.bases import Asked
from adapters.merge.orders import ComposeOrder, MergeOrder, recipe_of
from adapters.merge.plan import Dtype
from adapters.records import MERGE_ONLY, READY
from adapters.registry import Registry, Version
from adapters.upload import UploadOptions
from server.admission import Admission
from server.errors import AdapterUnavailable, Overloaded, PermissionDenied
from server.jobs import Run
from server.merge_fields import Budget, MergeFields
from server.merging import Merging
from server.settings import Settings
from server.take_in import take_in

log = logging.getLogger(__name__)

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
        settings: Settings,
    ) -> None:
        self._jobs = jobs
        self._registry = registry
        self._ingest = ingest
        self._admission = admission
        self._merging = merging
        self._settings = settings
        self._root = settings.data_dir.absolute() / "merged"

    def ask(self, fields: MergeFields, by: str) -> Job:
        """A new job. Raises what is known to be wrong already."""
        require_merging(self._settings)
        asked = fields.model_dump(mode="json", exclude_unset=True)
        if fields.into is not None:
            versions = [mergeable(self._registry, self._merging.base.name, part.model) for part in fields.adapters]
            recipe_of(self._recipe(fields))
            self._ingest.require_possible(fields.into.name, self._options(fields, versions, by))
            asked["adapters"] = [
                {"weight": part.weight, **named(version)}
                for part, version in zip(fields.adapters, versions, strict=True)
            ]
        else:
            assert fields.adapter is not None
            asked["adapter"] = named(mergeable(self._registry, self._merging.base.name, fields.adapter))
        if self._jobs.count(QUEUED, [KIND]) >= MAX_QUEUED:
            raise Overloaded(f"{MAX_QUEUED} merges wait already; try again when some have ended")
        return self._jobs.create(KIND, asked, by=by)

    async def work(self, run: Run) -> Mapping[str, Any]:
        return await (self._combine(run) if "into" in run.job.params else self._merge(run))

    async def _merge(self, run: Run) -> Mapping[str, Any]:
        fields = asked(run.job)
        assert fields.adapter is not None
        version = await asyncio.to_thread(self._registry.resolve, *split_ref(fields.adapter))
        done = await self.merged(run, version, fields.base, fields.dtype, fields)
        return {"name": version.adapter, "version": version.number, **done}

    async def merged(
        self, run: Run, version: Version, values: Asked, dtype: Dtype, budget: Budget | None = None
    ) -> Mapping[str, Any]:
        """`directory`: the version and its base as one model, made now unless it is there. With `fidelity`, in short.

        For any job; what was measured is kept with the version.
        """
        directory = self._root / f"{version.adapter}@{version.digest.removeprefix('sha256:')[:12]}-{values}-{dtype}"
        adapter = await self._merging.adapter(run.job, version.ref, version.digest)
        out = directory if directory.exists() else self._merging.out(run.job)
        order = MergeOrder(
            adapter=str(adapter),
            base=self._merging.place,
            destination=str(out),
            values=values,
            dtype=dtype,
            proof=(budget or Budget()).proof(self._settings.merge_probe_tokens),
        )
        done = await self._merging.carry_out(run, order)
        await asyncio.to_thread(_put, self._merging.out(run.job), directory)
        await asyncio.to_thread(keep_report, self._registry, version, done)
        return {"directory": str(directory), **{key: done[key] for key in KEPT}}

    async def _combine(self, run: Run) -> Mapping[str, Any]:
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
        versions = [await asyncio.to_thread(self._registry.resolve, *split_ref(each["ref"])) for each in given]
        options = self._options(fields, versions, run.job.created_by)
        version, created = await take_in(self._admission, run, fields.into.name, self._merging.out(run.job), options)
        return {
            "name": version.adapter,
            "version": version.number,
            "digest": version.digest,
            "state": version.state,
            "created": created,
            **done,
        }

    def sweep(self) -> None:
        """Merged weights of versions that are gone."""
        known = {digest.removeprefix("sha256:")[:12] for digest in self._registry.digests()}
        for directory in self._root.iterdir() if self._root.exists() else ():
            if directory.name.rpartition("@")[2].partition("-")[0] not in known:
                shutil.rmtree(directory, ignore_errors=True)

    def _recipe(self, fields: MergeFields) -> dict[str, Any]:
        return {
            "method": fields.method,
            "weights": [part.weight for part in fields.adapters],
            "density": fields.density,
            "majority_sign_method": fields.majority_sign_method,
            "seed": fields.seed,
            "rank": fields.svd_rank or self._settings.max_lora_rank,
        }

    def _options(self, fields: MergeFields, versions: list[Version], by: str | None) -> UploadOptions:
        assert fields.into is not None
        into = fields.into
        return UploadOptions(by=by, promote=into.promote, description=into.description, tags=into.tags)


KEPT = ("plan", "values", "reason", "dtype", "size_bytes", "notes", "fidelity")
"""Of what the process says of a merge, in the job's result."""


def require_merging(settings: Settings) -> None:
    if not settings.merging:
        raise PermissionDenied("merging is switched off here (merging)", code="merging_off")


def mergeable(registry: Registry, base_name: str, asked: str) -> Version:
    """The version that `name@ref` means. Raises AdapterUnavailable for one in no state to be merged."""
    version = registry.resolve(*split_ref(asked.removeprefix(base_name + ":")))
    if version.state not in (READY, MERGE_ONLY):
        raise AdapterUnavailable(
            f"adapter {version.ref} is {version.state}" + (f": {version.reason}" if version.reason else ""),
            code=f"adapter_{version.state}",
        )
    return version


def split_ref(asked: str) -> tuple[str, str | None]:
    name, _, ref = asked.partition("@")
    return name, ref or None


def named(version: Version) -> dict[str, str]:
    return {"ref": version.ref, "digest": version.digest}


def asked(job: Job) -> MergeFields:
    """With the versions that its references meant when it was made."""
    params = dict(job.params)
    if "adapter" in params:
        params["adapter"] = params["adapter"]["ref"]
    else:
        params["adapters"] = [{"model": each["ref"], "weight": each["weight"]} for each in params["adapters"]]
    return MergeFields.model_validate(params)


def keep_report(registry: Registry, version: Version, done: Mapping[str, Any]) -> None:
    try:
        registry.set_merge_report(version, done["fidelity"], done["report"])
    except NotFound:
        log.warning("merged, and gone meanwhile", extra={"adapter": version.ref})


def _put(made: Path, directory: Path) -> None:
    if made.exists():  # else it was there before, or a crash came between this and the end of the job
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(directory, ignore_errors=True)
        made.rename(directory)
