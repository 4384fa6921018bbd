"""A fine-tuning job, its events and checkpoints as OpenAI's client reads them."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from adapters.job_records import RUNNING, SUCCEEDED, Job, JobEvent
from server.fine_tuning import asked, public_id
from server.fine_tuning_layout import DEFAULT_SEED

FILE = re.compile(r"\b(training_file|validation_file)/")
"""In whose directory a file lies that a message names."""
LEVELS = {"warning": "warn"}


def job_json(job: Job, base: str) -> dict[str, Any]:
    fields = asked(job)
    result = job.result or {}
    found = result.get("hyperparameters") or job.progress.get("hyperparameters") or {}
    hyperparameters = fields.wanted.model_dump(mode="json") | found
    return {
        "id": public_id(job),
        "object": "fine_tuning.job",
        "created_at": _seconds(job.created_at),
        "error": _error(job),
        "estimated_finish": job.progress.get("estimated_finish") if job.state == RUNNING else None,
        "fine_tuned_model": result.get("name"),
        "finished_at": _seconds(job.ended_at),
        "hyperparameters": hyperparameters,
        "integrations": [],
        "metadata": fields.metadata,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "model": fields.model or base,
        "organization_id": "loraplex",
        "progress": {key: value for key, value in job.progress.items() if key != "hyperparameters"},
        "result_files": result.get("result_files", []),
        "seed": DEFAULT_SEED if fields.seed is None else fields.seed,
        "status": _status(job),
        "trained_tokens": result.get("trained_tokens"),
        "training_file": fields.training_file,
        "user_provided_suffix": fields.suffix,
        "validation_file": fields.validation_file,
    }


def event_json(event: JobEvent) -> dict[str, Any]:
    return {
        "id": f"ftevent-{event.id}",
        "object": "fine_tuning.job.event",
        "created_at": _seconds(event.at),
        "level": LEVELS.get(event.level, event.level),
        "message": event.message,
        "type": "metrics" if event.data else "message",
        "data": event.data,
    }


def checkpoints_of(job: Job) -> list[dict[str, Any]]:
    if job.state != SUCCEEDED or job.result is None:
        return []
    result = job.result
    metrics = {"step": result["steps"], "train_loss": result["train_loss"], "full_valid_loss": result["valid_loss"]}
    return [
        {
            "id": f"ftckpt-{job.id.removeprefix('job-')}",
            "object": "fine_tuning.job.checkpoint",
            "created_at": _seconds(job.ended_at),
            "fine_tuned_model_checkpoint": f"{result['name']}@{result['version']}",
            "fine_tuning_job_id": public_id(job),
            "metrics": metrics,
            "step_number": result["steps"],
        }
    ]


def _status(job: Job) -> str:
    if job.state == RUNNING and job.progress.get("stage") == "validating":
        return "validating_files"
    return job.state


def _error(job: Job) -> dict[str, Any] | None:
    if job.error is None:
        return None
    message, param = job.error["message"], job.error.get("param")
    place = FILE.search(message)
    return {"code": job.error["code"], "message": message, "param": param or (place and place[1])}


def _seconds(at: datetime | None) -> int | None:
    return None if at is None else int(at.timestamp())
