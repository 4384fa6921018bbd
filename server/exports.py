"""FLOW export, as a job: an adapter and its base → one process that merges, measures, writes and loads again → files
that appear whole, and stay until they expire or somebody deletes them.

The same request again is the same export.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from adapters.errors import Conflict, NotFound, NotTheSame
from adapters.export_store import Export, ExportFile, ExportStore, id_of
from adapters.file_store import FileStore
from adapters.job_records import CANCELLED, FAILED, QUEUED, SUCCEEDED
from adapters.jobs import Job, Jobs
from adapters.merge.export.exporting import DIFFERENCES, LOSS
from adapters.merge.orders import ExportOrder
from adapters.merge.report import FidelityReport
from adapters.merge.sizes import export_bytes, parameters, work_bytes
from adapters.merge.verify import Wishes, require
from adapters.registry import Registry
from server.data_files import VALIDATION, require_data, rows_of
from server.errors import InsufficientStorage, Overloaded
from server.jobs import Run
from server.merge_fields import ExportFields
from server.mergeable import keep_report, mergeable, named, require_merging
from server.merging import Merging
from server.settings import Settings

KIND = "export"
MAX_QUEUED = 1000
READY = "ready"
ENDED_BADLY = (FAILED, CANCELLED)
"""Those that are made anew when they are asked for again."""
RESERVE_BYTES = 1 << 28
"""What an export must leave free on the disk."""


class Exports:
    def __init__(
        self,
        jobs: Jobs,
        registry: Registry,
        store: ExportStore,
        files: FileStore,
        merging: Merging,
        settings: Settings,
    ) -> None:
        self._files = files
        self._jobs = jobs
        self._registry = registry
        self._store = store
        self._merging = merging
        self._settings = settings

    def ask(self, fields: ExportFields, by: str) -> tuple[Export, bool]:
        """The export, and whether a job was made for it now. Raises what is known to be wrong already."""
        require_merging(self._settings)
        version = mergeable(self._registry, self._merging.base.name, fields.adapter)
        base = self._merging.base
        options = {"base": fields.base, "outtype": fields.stored}
        export_id = id_of(version.digest, base.fingerprint, fields.format, options | self._same_rows(fields))
        if fields.validation_file is not None:
            options[VALIDATION] = fields.validation_file
        with self._store.alone:
            self.sweep()
            known = self._store.find(export_id)
            if known is not None and self.state(known) not in ENDED_BADLY:
                self._require_faithful(known, fields)
                return known, False
            if self._jobs.count(QUEUED, [KIND]) >= MAX_QUEUED:
                raise Overloaded(f"{MAX_QUEUED} exports wait already; try again when some have ended")
            estimate = export_bytes(fields.format, fields.stored, self._parameters, version.manifest.size_bytes)
            self._require_room(export_id, fields.format, estimate)
            asked = fields.model_dump(mode="json", exclude_unset=True)
            job = self._jobs.create(KIND, {**asked, "adapter": named(version), "export": export_id}, by=by)
            export = Export(
                id=export_id,
                adapter=version.ref,
                digest=version.digest,
                base={"name": base.name, "fingerprint": base.fingerprint},
                format=fields.format,
                options=options,
                estimated_bytes=estimate,
                job=job.id,
                created_at=int(time.time()),
                created_by=by,
            )
            self._store.keep(export)
        return export, True

    def job_for(self, fields: ExportFields, by: str) -> Job:
        """The job of the export that this is; a new one where that is forgotten."""
        export, _ = self.ask(fields, by)
        job = self.job(export)
        if job is None:
            asked = fields.model_dump(mode="json", exclude_unset=True)
            named_again = {"adapter": {"ref": export.adapter, "digest": export.digest}, "export": export.id}
            job = self._jobs.create(KIND, {**asked, **named_again}, by=by)
            self._store.keep(replace(export, job=job.id))
        return job

    async def work(self, run: Run) -> Mapping[str, Any]:
        params = run.job.params
        export = await asyncio.to_thread(self._store.export, params["export"])
        if export.ready_at is not None:
            return _result(export)
        fields = ExportFields.model_validate(
            {key: value for key, value in params.items() if key != "export"} | {"adapter": export.adapter}
        )
        adapter = await self._merging.adapter(run.job, export.adapter, export.digest)
        order = ExportOrder(
            adapter=str(adapter),
            base=self._merging.place,
            destination=str(self._merging.out(run.job)),
            format=fields.format,
            outtype=fields.stored,
            values=fields.base,
            proof=fields.proof(self._settings.merge_probe_tokens, await asyncio.to_thread(self._rows, run.job, fields)),
        )
        done = await self._merging.carry_out(run, order)
        return await asyncio.to_thread(self._take_in, run, export, done)

    def _rows(self, job: Job, fields: ExportFields) -> tuple[str, ...]:
        return rows_of(self._files, VALIDATION, fields.validation_file, self._merging.beside(job, VALIDATION))

    def _same_rows(self, fields: ExportFields) -> dict[str, str]:
        """Uploaded twice, they are still the same. Raises BadRequest."""
        if fields.validation_file is None:
            return {}
        return {VALIDATION: require_data(self._files, VALIDATION, fields.validation_file).sha256}

    def _take_in(self, run: Run, export: Export, done: Mapping[str, Any]) -> Mapping[str, Any]:
        files = tuple(ExportFile(**each) for each in done["files"])
        with self._store.alone:
            if self._store.find(export.id) is None:
                raise NotFound(f"{export.id} was deleted while it was made")
            self._store.take_in(export, self._merging.out(run.job))
            now, kept_s = int(time.time()), self._settings.export_kept_s
            expires_at = None if kept_s is None else int(now + kept_s)
            export = self._store.ready(replace(export, files=files, report=done["report"]), now, expires_at)
        if "fidelity" in done["report"]:
            keep_report(self._registry, export.adapter, done["report"])
        return _result(export)

    def export(self, export_id: str) -> Export:
        """NotFound also for one that has expired."""
        found = self._store.export(export_id)
        if found.expires_at is not None and found.expires_at <= time.time():
            self.sweep()
            return self._store.export(export_id)
        return found

    def exports(self) -> list[Export]:
        """The newest first."""
        self.sweep()
        return self._store.exports()

    def path(self, export: Export) -> Path:
        """Where its files lie."""
        return self._store.path(export.id)

    def ready(self, export_id: str) -> Export:
        """Raises Conflict for one that has no files yet, or never will."""
        export = self.export(export_id)
        if (state := self.state(export)) != READY:
            raise Conflict(f"{export_id} is {state}; its files are there when it is ready", code="export_not_ready")
        return export

    def state(self, export: Export) -> str:
        """`ready`, or as its job is. One whose job is forgotten has failed."""
        if export.ready_at is not None:
            return READY
        job = self.job(export)
        return FAILED if job is None or job.state == SUCCEEDED else job.state

    def job(self, export: Export) -> Job | None:
        try:
            return self._jobs.job(export.job)
        except NotFound:
            return None

    def delete(self, export_id: str, by: str) -> Job | None:
        """With its files; the job that makes it, if it runs, which is cancelled."""
        with self._store.alone:
            export = self._store.export(export_id)
            self._store.delete(export_id)
        job = self.job(export)
        return self._jobs.cancel(job.id, by=by) if job is not None and not job.has_ended else None

    def sweep(self) -> None:
        """What expired goes, what crashes left, and the records of those that failed when they are as old."""
        now, kept_s = int(time.time()), self._settings.export_kept_s
        with self._store.alone:
            self._store.sweep(now)
            if kept_s is None:
                return
            for export in self._store.exports():
                if export.created_at + kept_s <= now and self.state(export) in ENDED_BADLY:
                    self._store.delete(export.id)

    def _require_faithful(self, export: Export, fields: ExportFields) -> None:
        """What one caller accepted is not accepted for another. Raises Unfaithful, NotTheSame."""
        if (measured := export.report.get("report")) is not None:
            proof = fields.proof(self._settings.merge_probe_tokens)
            require(FidelityReport.from_json(measured), Wishes(budget=proof.budget, accept_loss=proof.accept_loss))
        accepts = {LOSS: fields.accept_loss, DIFFERENCES: fields.accept_differences}
        for what, found in export.report.get("export", {}).get("accepted", {}).items():
            if not accepts[what]:
                raise NotTheSame(found)

    @cached_property
    def _parameters(self) -> int:
        return parameters(self._merging.base)

    def _require_room(self, export_id: str, format_: str, estimate: int) -> None:
        others = [each for each in self._store.exports() if each.id != export_id]
        there = sum(each.size_bytes for each in others if self.state(each) not in ENDED_BADLY)
        limit = self._settings.max_export_bytes
        if there + estimate > limit:
            raise InsufficientStorage(
                f"the export would take about {estimate} bytes, and there are {there} of exports already; all of them "
                f"may take {limit} (max_export_bytes): delete some first"
            )
        needed = estimate + work_bytes(format_, self._parameters) + RESERVE_BYTES
        free = shutil.disk_usage(self._settings.data_dir).free
        if needed > free:
            raise InsufficientStorage(
                f"making the export takes about {needed} bytes of the disk, {free} are free; make room in data_dir"
            )


def _result(export: Export) -> dict[str, Any]:
    name, _, number = export.adapter.partition("@")
    told = {"fidelity": export.report["fidelity"]} if "fidelity" in export.report else {}
    files = {"size_bytes": export.size_bytes, "files": len(export.files)}
    return {"name": name, "version": int(number), "export": export.id, **files, **told}
