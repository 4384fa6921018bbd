"""The parts of a running server, wired once by app.py and handed to the routes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from adapters.base import BaseModel
from adapters.file_store import FileStore
from adapters.ingest import Ingest
from adapters.jobs import Jobs
from adapters.promotions import Promotions
from adapters.registry import Registry
from adapters.store import Store
from server.admission import Admission
from server.engine.merged import MergedEngines
from server.engine.pool import EnginePool
from server.exports import Exports
from server.fairness import Turns
from server.fetches import Fetches
from server.fine_tuning import FineTuning
from server.generate import Generator
from server.identity import Identity
from server.intake import Intake
from server.jobs import JobRunner
from server.lifecycle import Lifecycle
from server.merged_versions import MergedVersions
from server.merges import Merges
from server.merging import Merging
from server.presence import Presence
from server.promotion import Promoter
from server.residency import Residency
from server.settings import Settings
from server.shadow import Shadows
from server.telemetry import Telemetry
from server.upkeep import Upkeep


@dataclass(frozen=True)
class Services:
    settings: Settings
    base: BaseModel
    registry: Registry
    store: Store
    fetches: Fetches
    ingest: Ingest
    admission: Admission
    jobs: Jobs
    intake: Intake
    files: FileStore
    fine_tuning: FineTuning
    merging: Merging
    merges: Merges
    exports: Exports
    runner: JobRunner
    pool: EnginePool
    merged: MergedEngines
    merged_versions: MergedVersions
    identity: Identity
    presence: Presence
    promotions: Promotions
    promoter: Promoter
    turns: Turns
    residency: Residency
    lifecycle: Lifecycle
    upkeep: Upkeep
    shadows: Shadows
    generator: Generator
    telemetry: Telemetry


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Wired = Annotated[Services, Depends(_services)]
