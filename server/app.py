"""Composition root: settings → wired services (wiring.py) → an ASGI application, and how that starts and stops."""

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
from server import problems
from server.base import find_base, weights_of
from server.engine import memory_plan, vllm_args
from server.engine.fake import FakeEngine
from server.engine.protocol import Engine
from server.engine.vllm import VllmEngine
from server.errors import SettingsError
from server.keys import load_keys
from server.logs import Edge
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
from server.services import Services
from server.settings import Settings
from server.wiring import MakeMerged, wire


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
        held.callback(services.identity.release)
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
    await services.presence.open()
    await services.promoter.open()
    services.runner.open()
    try:
        yield
    finally:
        await services.promoter.close()
        await services.presence.close()
        await services.shadows.close()
        await services.runner.close()
        await services.admission.close()
        await services.lifecycle.close()
        services.fetches.close()
        services.upkeep.close()
        await services.merged.close()
        await services.merged_versions.close()
        await services.pool.close()
