"""Composition root: settings → wired services → an ASGI application. Nothing else builds a collaborator."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

from fastapi import FastAPI

from adapters.base import BaseModel
from adapters.errors import Conflict
from adapters.export_store import ExportStore
from adapters.file_store import FileStore
from adapters.ingest import Ingest
from adapters.job_records import Job
from adapters.jobs import Jobs
from adapters.promotions import Promotions
from adapters.registry import Registry
from adapters.sources.address import Policy
from adapters.storage import open_store
from adapters.upload import UploadLimits
from server import problems
from server.admission import Admission
from server.base import find_base, weights_of
from server.engine import memory_plan, vllm_args
from server.engine.fake import FakeEngine
from server.engine.merged import MergedEngines
from server.engine.pool import EnginePool
from server.engine.protocol import Engine
from server.engine.vllm import VllmEngine
from server.errors import SettingsError
from server.exports import KIND as EXPORT
from server.exports import Exports
from server.fairness import Turns
from server.fetches import Fetches
from server.fine_tuning import KIND as FINE_TUNE
from server.fine_tuning import FineTuning
from server.generate import Generator
from server.identity import server_identity
from server.intake import KIND as FETCH
from server.intake import Intake
from server.jobs import JobRunner, Kind
from server.keys import load_keys
from server.lifecycle import Lifecycle
from server.logs import Edge
from server.merged_versions import KIND as MERGED_ENGINE
from server.merged_versions import MergedVersions
from server.merges import KIND as MERGE
from server.merges import Merges
from server.merging import Merging
from server.probe import Probe
from server.promotion import Promoter
from server.promotion_ledger import Ledger
from server.residency import Residency
from server.resolve import Resolver
from server.routes import (
    adapters,
    aliases,
    data_files,
    exports,
    files,
    fine_tuning_jobs,
    generation,
    health,
    jobs,
    merged,
    merges,
    models,
    operations,
    promotions,
    upkeep,
    uploads,
    versions,
)
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


def create_app(
    settings: Settings,
    *,
    build_engine: Callable[[], Engine] | None = None,
    make_merged: MakeMerged | None = None,
) -> FastAPI:
    """The application, unstarted. `build_engine` and `make_merged` replace the settings' engines (tests)."""
    _make_data_dir(settings)
    if build_engine is None and settings.engine == "vllm":
        vllm_args.prepare_environment(settings)  # first: making the demo base imports torch, which reads some of it
    base = find_base(settings)
    build = build_engine or engine_builder(settings, base)
    services = wire(settings, base, build, make_merged or merged_builder(settings))
    app = FastAPI(title="loraplex", lifespan=_lifespan, openapi_url=None)
    app.state.services = services
    app.state.keys = load_keys(settings.api_keys, settings.key_file)
    app.add_middleware(Edge)
    problems.install(app)
    for noun in (adapters, versions, aliases):
        app.include_router(noun.reading)
        app.include_router(noun.changing)
    for router in (upkeep.collecting, upkeep.verifying):
        app.include_router(router)
    for each in (
        generation,
        models,
        uploads,
        files,
        data_files,
        fine_tuning_jobs,
        merged,
        promotions,
        merges,
        exports,
        jobs,
        operations,
        health,
    ):
        app.include_router(each.router)
    return app


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
    resolver = Resolver(registry, store, base.name, merged.serves)
    fetches = Fetches(store)
    ways = Ways(pool, merged, resolver, fetches, turns, residency, telemetry)
    shadows = Shadows(registry, pool, resolver, fetches, turns, residency, running, lifecycle, telemetry)
    traffic = Traffic(settings.promotion_window_s)
    generator = Generator(ways, resolver, running, lifecycle, shadows, telemetry, traffic, settings.max_request_bytes)
    upkeep = Upkeep(store, registry, ingest, residency, lifecycle)
    probe = Probe(pool, turns, residency) if settings.probe_uploads else None
    admission = Admission(registry, ingest, fetches, lifecycle, probe)
    queue = Jobs(registry.database)
    policy = Policy(settings.source_protocols, settings.source_roots)
    intake = Intake(queue, ingest, admission, policy, limits, settings.source_timeout_s)
    files = FileStore(settings.data_dir / "files")
    fine_tuning = FineTuning(queue, files, resolver, fetches, admission, base, settings)
    kinds = {FETCH: Kind(intake.work, settings.max_fetches)}
    if settings.fine_tuning:
        kinds[FINE_TUNE] = Kind(fine_tuning.work, at_once=1)
    merging = Merging(queue, fetches, base, settings)
    exports = Exports(queue, registry, ExportStore(settings.data_dir.absolute() / "exports"), merging, settings)
    merges = Merges(queue, registry, ingest, admission, merging, exports, settings)
    if settings.merging:
        kinds |= {MERGE: Kind(merges.work, at_once=1), EXPORT: Kind(exports.work, at_once=1)}

    def job_ended(job: Job) -> None:
        telemetry.job_ended(job)
        fine_tuning.ended(job)
        merging.ended(job)
        merged_versions.ended(job)

    merged_versions = MergedVersions(queue, registry, merging, merged, base, settings)
    kinds[MERGED_ENGINE] = Kind(merged_versions.work, at_once=1)
    runner = JobRunner(queue, kinds, job_ended)
    stories = Promotions(registry.database, server_identity(settings.data_dir))
    promoter = Promoter(
        settings,
        traffic,
        Ledger(stories, registry, telemetry),
        merged,
        queue,
        begin=lambda version: merged_versions.ask(version, "served", PROMOTER),
        room=lambda: merged.require_room("", memory_plan.plan_of_merge(base, settings)),
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


def _make_data_dir(settings: Settings) -> None:
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"data_dir is {str(settings.data_dir)!r}, which cannot be made: {error.strerror}; choose a directory that "
            "this user may write to"
        ) from None
    if not os.access(settings.data_dir, os.W_OK | os.X_OK):
        raise SettingsError(f"data_dir is {str(settings.data_dir)!r}, which this user may not write to")


def engine_builder(settings: Settings, base: BaseModel) -> Callable[[], Engine]:
    """A maker of fresh engines, for the first start and for every rebuild."""
    if settings.engine == "fake":
        return lambda: FakeEngine(base.name, capacity=settings.resident_adapters + 1)
    targets = {module.rpartition(".")[2] for module in base.modules}
    return lambda: VllmEngine(lambda: vllm_args.command_line(settings, weights_of(settings, base), base.name, targets))


def merged_builder(settings: Settings) -> MakeMerged:
    """A maker of fresh engines of merged weights."""
    if settings.engine == "fake":
        return lambda name, _: FakeEngine(name)

    def arguments(name: str, merged: Path) -> list[str]:
        share = memory_plan.gpu_share(memory_plan.plan_of(merged, settings), settings)
        return vllm_args.merged_command_line(settings, merged, name, share)

    return lambda name, merged: VllmEngine(partial(arguments, name, merged))


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    with ExitStack() as held:
        held.callback(services.registry.close)
        await asyncio.to_thread(_take_up_jobs, services)
        await asyncio.to_thread(held.enter_context, services.registry.serving())
        async with _running(services):
            yield


def _take_up_jobs(services: Services) -> None:
    """Where no other server is up, nobody works on what is marked as running: its silence need not be waited for."""
    with suppress(Conflict), services.registry.unserved():
        services.runner.recover(silent_s=0)


@asynccontextmanager
async def _running(services: Services) -> AsyncIterator[None]:
    services.ingest.sweep()
    services.files.sweep()
    for noun in (services.fine_tuning, services.merging, services.exports):
        noun.sweep()
    services.merged_versions.sweep_soon()
    services.pool.open()
    await services.shadows.reload()
    await services.lifecycle.resume()
    await services.admission.resume()
    await services.promoter.open()
    services.runner.open()
    try:
        yield
    finally:
        await services.promoter.close()
        await services.shadows.close()
        await services.runner.close()
        await services.admission.close()
        await services.lifecycle.close()
        services.fetches.close()
        services.upkeep.close()
        await services.merged.close()
        await services.merged_versions.close()
        await services.pool.close()
