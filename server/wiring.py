"""Every collaborator of a running server, built once and handed to those that need it. Starts nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from adapters.base import BaseModel
from adapters.export_store import ExportStore
from adapters.file_store import FileStore
from adapters.ingest import Ingest
from adapters.job_records import Job
from adapters.jobs import Jobs
from adapters.promotions import Promotions
from adapters.registry import Registry
from adapters.servers import Servers
from adapters.sources.address import Policy
from adapters.storage import open_store
from adapters.upload import UploadLimits
from server.admission import Admission
from server.engine import memory_plan
from server.engine.merged import MergedEngines
from server.engine.pool import EnginePool
from server.engine.protocol import Engine
from server.exports import KIND as EXPORT
from server.exports import Exports
from server.fairness import Turns
from server.fetches import Fetches
from server.fine_tuning import KIND as FINE_TUNE
from server.fine_tuning import FineTuning
from server.generate import Generator
from server.identity import Identity
from server.intake import KIND as FETCH
from server.intake import Intake
from server.jobs import JobRunner, Kind
from server.lifecycle import Lifecycle
from server.merged_versions import KIND as MERGED_ENGINE
from server.merged_versions import MergedVersions
from server.merges import KIND as MERGE
from server.merges import Merges
from server.merging import Merging
from server.presence import Presence
from server.probe import Probe
from server.promotion import Promoter
from server.promotion_ledger import Ledger
from server.residency import Residency
from server.resolve import Resolver
from server.running import Running
from server.services import Services
from server.settings import Settings
from server.shadow import Shadows
from server.telemetry import Telemetry
from server.traffic import Traffic
from server.upkeep import Upkeep
from server.ways import Ways

PROMOTER = "promotion"
"""Who asks for an engine where no person does, in the list of jobs."""
MakeMerged = Callable[[str, Path], Engine]
"""Makes an engine for merged weights: the name of the version, and where they lie."""


def wire(settings: Settings, base: BaseModel, build_engine: Callable[[], Engine], make_merged: MakeMerged) -> Services:
    """Build every collaborator once."""
    store = open_store(settings.data_dir, settings.store_url)
    registry = Registry(settings.registry_url)
    limits = UploadLimits(settings.max_upload_bytes, settings.max_upload_files)
    ingest = Ingest(store, registry, base, limits, settings.max_lora_rank)
    pool = EnginePool(build_engine, on_loss=lambda: residency.forget_all())
    residency = Residency(pool.running, settings.resident_adapters, settings.adapter_wait_s)
    running = Running()
    turns = line_up(settings, lambda: merged.waiting)
    merged = MergedEngines(
        pool,
        make_merged,
        partial(memory_plan.plan_of, settings=settings),
        partial(memory_plan.free_bytes, settings),
        lambda: line_up_merged(settings, lambda: turns.waiting + merged.waiting),
        most=settings.max_merged_engines,
        reserve=settings.memory_reserve_bytes,
    )
    lifecycle = Lifecycle(registry, ingest, residency, running, merged, settings.keep_versions)
    telemetry = Telemetry(settings.max_metric_adapters)
    resolver = Resolver(registry, store, base.name, lambda version, alias: merged_versions.why_not(version, alias))
    fetches = Fetches(store)
    ways = Ways(pool, merged, resolver, fetches, turns, residency, telemetry)
    shadows = Shadows(registry, pool, resolver, fetches, turns, residency, running, lifecycle, telemetry)
    traffic = Traffic(settings.promotion_window_s)
    generator = Generator(ways, resolver, running, lifecycle, shadows, telemetry, traffic, settings.max_request_bytes)
    upkeep = Upkeep(store, registry, ingest, residency, lifecycle)
    probe = Probe(pool, turns, residency) if settings.probe_uploads else None
    admission = Admission(registry, ingest, fetches, lifecycle, probe)
    queue = Jobs(registry.database)
    identity = Identity(settings.data_dir)
    policy = Policy(settings.source_protocols, settings.source_roots)
    intake = Intake(queue, ingest, admission, policy, limits, settings.source_timeout_s)
    files = FileStore(settings.data_dir / "files")
    fine_tuning = FineTuning(queue, files, resolver, fetches, admission, base, settings)
    kinds = {FETCH: Kind(intake.work, settings.max_fetches)}
    if settings.fine_tuning:
        kinds[FINE_TUNE] = Kind(fine_tuning.work, at_once=1)
    merging = Merging(queue, fetches, base, settings)
    kept = ExportStore(settings.data_dir.absolute() / "exports")
    exports = Exports(queue, registry, kept, files, merging, settings)
    merges = Merges(queue, registry, ingest, admission, merging, exports, settings)

    def job_ended(job: Job) -> None:
        telemetry.job_ended(job)
        fine_tuning.ended(job)
        merging.ended(job)
        merged_versions.ended(job)

    merged_versions = MergedVersions(queue, registry, files, merging, merged, base, settings, identity.id)
    registry.answers = merged_versions.answers
    if settings.merging:
        work = {MERGE: merges.work, EXPORT: exports.work, MERGED_ENGINE: merged_versions.work}
        kinds |= {kind: Kind(each, at_once=1) for kind, each in work.items()}
    runner = JobRunner(queue, kinds, job_ended, identity.id)
    stories = Promotions(registry.database, identity.id)
    presence = Presence(Servers(registry.database, identity.id), queue, stories, merged_versions.forget)
    promoter = Promoter(
        settings,
        traffic,
        Ledger(stories, registry, telemetry),
        merged,
        queue,
        begin=lambda version, asked: merged_versions.ask_again(version, asked, PROMOTER),
        asked=merged_versions.asked,
        room=lambda: merged_versions.require_room(settings.merged_quantization),
    )
    return Services(
        settings,
        base,
        registry,
        store,
        fetches,
        ingest,
        admission,
        queue,
        intake,
        files,
        fine_tuning,
        merging,
        merges,
        exports,
        runner,
        pool,
        merged,
        merged_versions,
        identity,
        presence,
        stories,
        promoter,
        turns,
        residency,
        lifecycle,
        upkeep,
        shadows,
        generator,
        telemetry,
    )


def line_up(settings: Settings, others: Callable[[], int]) -> Turns:
    """Who may go to the engine: what it decodes together, a few that are ready to take over in the very step after one
    has ended, and a few newcomers. As many adapters as it can decode, or, where its slots go round, as it can hold."""
    return Turns(
        settings.resident_adapters if settings.rotates else settings.slots,
        settings.sequences + settings.spare_sequences,
        settings.adapter_turn_s,
        settings.max_waiting_requests,
        settings.spare_sequences if settings.rotates else 0,
        others=others,
    )


def line_up_merged(settings: Settings, others: Callable[[], int]) -> Turns:
    """The same for a merged engine, which has one line and no slots. `others` counts those who wait here as well."""
    seats = settings.sequences + settings.spare_sequences
    turns = Turns(
        1, seats, settings.adapter_turn_s, settings.max_waiting_requests, others=lambda: others() - turns.waiting
    )
    return turns
