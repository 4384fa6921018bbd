"""`loraplex jobs`: what a server fetches in the background; and a job followed to its end with a bar.

Exit codes as of `loraplex adapters`. Ctrl-C while a job is followed cancels the job.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Column, Table

from adapters.errors import AdapterError, RemoteRefusal, RemoteUnreachable
from adapters.remote import Remote
from server.adapters_cli import tables

SERVER = "http://127.0.0.1:8000"
ID_CHARACTERS = 27
LOOK_S = 0.3
AWAY_S = 60.0
"""How long a server may be away, to be started again, before following is given up. The job goes on without us."""


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    run: Callable[[Remote, argparse.Namespace, Console], dict[str, Any]] = arguments.run
    try:
        with Remote(arguments.server, arguments.api_key) as remote:
            answer = run(remote, arguments, Console(quiet=arguments.json))
    except AdapterError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(error.message)} ({error.code})", soft_wrap=True)
        return 1
    if arguments.json:
        Console(soft_wrap=True, highlight=False, markup=False).print(json.dumps(answer, indent=2))
    return 0


def list_jobs(remote: Remote, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The newest first."""
    answer = remote.jobs(limit=arguments.limit, state=arguments.state)
    widths = {"job": ID_CHARACTERS, "state": 9, "adapter": 8, "read": 7, "source": 8}  # a part of an id names nothing
    table = Table(*(Column(name, no_wrap=True, min_width=width) for name, width in widths.items()), box=None)
    for job in answer["data"]:
        params = job["params"]
        table.add_row(
            job["id"],
            job["state"],
            escape(_whose(params)),
            tables.size(job["progress"].get("bytes", 0)),
            escape(params.get("source", "")),
        )
    console.print(table if answer["data"] else "no jobs")
    return answer


def _whose(params: dict[str, Any]) -> str:
    """The adapter that a job makes, or reads."""
    read, into = params.get("adapter"), params.get("into")
    if isinstance(read, dict):
        return str(read["ref"])
    return str(into["name"]) if isinstance(into, dict) else str(params.get("name", ""))


def show(remote: Remote, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """One job with its events."""
    job = remote.job(arguments.job)
    events = remote.job_events(arguments.job)["data"]
    console.print(f"[bold]{job['id']}[/] {job['kind']}, {job['state']}", highlight=False)
    for name in ("params", "progress", "result", "error"):
        if job[name]:
            facts = ", ".join(f"{key} {value}" for key, value in job[name].items() if value not in (None, {}, []))
            console.print(f"  {name:10} {escape(facts)}", highlight=False, soft_wrap=True)
    for event in events:
        text = f"  {tables.time(event['created_at'])}  {escape(event['message'])}"
        console.print(text, highlight=False, soft_wrap=True)
    return {**job, "events": events}


def cancel(remote: Remote, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Stop a job that waits or runs."""
    job = remote.cancel_job(arguments.job)
    done = "cancelled" if job["state"] == "cancelled" else "will stop as soon as it notices"
    console.print(f"{job['id']} {done}", highlight=False)
    return job


def follow(remote: Remote, job: dict[str, Any], console: Console) -> dict[str, Any]:
    """The job when it has succeeded. Raises RemoteRefusal with the job's error, or when it was cancelled."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        shown = bar.add_task(_doing(job), total=None)
        while job["ended_at"] is None:
            try:
                time.sleep(LOOK_S)
                job = _look(remote, job["id"])
                progress = job["progress"]
                done, total = progress.get("bytes", 0), progress.get("total_bytes")
                bar.update(shown, description=escape(_doing(job)), completed=done, total=total)
            except KeyboardInterrupt:
                job = _stop(remote, job["id"], console)
    if job["state"] == "cancelled":
        raise RemoteRefusal(f"{job['id']} was cancelled; nothing was taken in", code="job_cancelled", status=409)
    if job["error"] is not None:
        raise RemoteRefusal(job["error"]["message"], code=job["error"]["code"], status=job["error"].get("status", 500))
    return job


def _look(remote: Remote, job_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + AWAY_S
    while True:
        try:
            return remote.job(job_id)
        except RemoteUnreachable:
            if time.monotonic() > deadline:
                raise
            time.sleep(LOOK_S)


def _stop(remote: Remote, job_id: str, console: Console) -> dict[str, Any]:
    try:
        job = remote.cancel_job(job_id)
    except RemoteRefusal as error:
        if error.code != "job_ended":
            raise
        return remote.job(job_id)  # it was too late
    console.print(f"cancelling {job_id}", highlight=False)
    return job


def _doing(job: dict[str, Any]) -> str:
    if job["state"] == "queued":
        return "waiting for its turn"
    progress = job["progress"]
    if "stage" in progress:
        at, of = progress.get("at"), progress.get("of")
        share = f" ({at / of:.0%})" if of else ""
        return f"{progress['stage']} {progress.get('what', '')}".rstrip() + share
    read = progress.get("bytes", 0)
    return "checking" if read and read == progress.get("total_bytes") else str(progress.get("file", "connecting"))


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    default = os.environ.get("LORAPLEX_SERVER", SERVER)
    common.add_argument("--server", default=default, help=f"its URL (default: LORAPLEX_SERVER, or {SERVER})")
    common.add_argument("--api-key", default=os.environ.get("LORAPLEX_API_KEY"), help="default: LORAPLEX_API_KEY")
    common.add_argument("--json", action="store_true", help="print the answer as JSON")
    parser = argparse.ArgumentParser(prog="loraplex jobs", description="What a running server does in the background.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for name, run in {"list": list_jobs, "show": show, "cancel": cancel}.items():
        made = verbs.add_parser(name, parents=[common], help=run.__doc__, description=run.__doc__)
        made.set_defaults(run=run)
        if name == "list":
            made.add_argument("--state", choices=("queued", "running", "paused", "succeeded", "failed", "cancelled"))
            made.add_argument("--limit", type=int, default=50, help="at most (default: 50)")
        else:
            made.add_argument("job", help="its id, job-…")
    return parser
