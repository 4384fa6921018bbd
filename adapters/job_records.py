"""What the job table hands out: jobs and their events, frozen. Knows no database and no kind of job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

QUEUED, RUNNING, PAUSED = "queued", "running", "paused"
SUCCEEDED, FAILED, CANCELLED = "succeeded", "failed", "cancelled"
ENDED = (SUCCEEDED, FAILED, CANCELLED)


@dataclass(frozen=True)
class Job:
    """One piece of work that outlives the request that asked for it."""

    id: str
    """`job-` and hex digits; a later job's is greater."""
    kind: str
    """What a worker must know to do it: `fetch`, `fine_tune`."""
    state: str
    params: Mapping[str, Any]
    """What was asked for; what they mean is the kind's affair."""
    progress: Mapping[str, Any]
    result: Mapping[str, Any] | None
    error: Mapping[str, Any] | None
    """`code`, `message` and what else the worker wants to say."""
    created_by: str | None
    """The id of the API key."""
    created_at: datetime
    started_at: datetime | None
    """Of the attempt that runs, or was the last."""
    ended_at: datetime | None
    worker: str | None
    """Who claimed it."""
    beat_at: datetime | None
    """When its worker was last heard of."""
    attempts: int
    cancel_requested: bool
    pause_requested: bool
    server: str | None = None
    """The only one that may claim it; None: any may."""

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED


@dataclass(frozen=True)
class JobEvent:
    id: int
    job: str
    at: datetime
    level: str
    """`info`, `warning` or `error`."""
    message: str
    data: Mapping[str, Any] | None
