"""Runs the durable jobs that belong to this process: claims them, beats for them, ends them as their work ends.

A job outlives the client that asked for it and the process that began it: what a stop or a crash interrupts is queued
again and begun anew, here or, if it is not this server's own, by another process on the same database. It does not know
what the kinds do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import uuid
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from adapters.errors import AdapterError, JobCancelled, JobLost, JobPaused
from adapters.jobs import Job, Jobs
from server import problems
from server.errors import ServerError

log = logging.getLogger(__name__)
Result = TypeVar("Result")

BEAT_S = 1.0
"""How often the table is told how far a job is, asked whether it shall stop, and looked through for new ones."""
SILENT_S = 20.0
"""Of a worker that has not been heard of for so long, the jobs are taken away."""
STOP_S = 2.0
"""How long a stop waits for work to notice it."""


class _Stopped(Exception):
    """The process stops; the job goes back into the queue."""


class WorkerDied(Exception):
    """What did the work is gone; the message says how, as `{message}; queued again`."""


class Run:
    """One attempt at a job, as its work sees it. Safe to use from the work's own thread."""

    def __init__(self, job: Job, jobs: Jobs, worker: str) -> None:
        self.job = job
        self.progress: Mapping[str, Any] = {}
        self._jobs = jobs
        self._worker = worker
        self._stop: Exception | None = None

    def report(self, **progress: Any) -> None:
        """How far it is. Raises when the work must stop; whoever is called often enough stops soon enough."""
        self.progress = progress
        if self._stop is not None:
            raise self._stop

    def event(self, message: str, **data: Any) -> None:
        """Told with what was reported last. Raises JobLost."""
        self._jobs.event(self.job.id, self._worker, message, self.progress, data=data or None)

    def stop(self, why: Exception) -> None:
        self._stop = self._stop or why

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """On a thread of its own, for which the end of the process does not wait: it may hang in somebody's driver."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Result] = loop.create_future()

        def deliver(settle: Callable[[Any], None], value: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(lambda: None if ended.done() else settle(value))

        def run() -> None:
            try:
                result = work()
            except BaseException as error:
                deliver(ended.set_exception, error)
            else:
                deliver(ended.set_result, result)

        threading.Thread(target=run, name=self.job.id, daemon=True).start()
        return await ended


Work = Callable[[Run], Awaitable[Mapping[str, Any]]]
"""What a kind of job does. Gives the result; what it raises is the job's error."""


@dataclass(frozen=True)
class Kind:
    work: Work
    at_once: int
    """How many of them run here at a time."""


class JobRunner:
    """`kinds`: what is worked on here. `on_end`: told of every job that ends here. `server`: whose own jobs are done
    here, beside those that are anybody's."""

    def __init__(
        self,
        jobs: Jobs,
        kinds: Mapping[str, Kind],
        on_end: Callable[[Job], None] = lambda _: None,
        server: str | None = None,
    ) -> None:
        self._jobs = jobs
        self._server = server
        self._kinds = kinds
        self._on_end = on_end
        self._worker = f"{socket.gethostname()[:60]}:{os.getpid()}:{uuid.uuid4().hex[:12]}"
        self._running: dict[asyncio.Task[None], Run] = {}
        self._woken = asyncio.Event()
        self._rounds: asyncio.Task[None] | None = None
        self._closing = False
        # One of its own: beats must not stand in line behind uploads.
        self._table = ThreadPoolExecutor(1, "jobs")

    @property
    def running(self) -> int:
        return len(self._running)

    def open(self) -> None:
        self._rounds = asyncio.create_task(self._go_round())

    def wake(self) -> None:
        """There is something to claim."""
        self._woken.set()

    def cancel(self, job_id: str) -> None:
        """What runs here need not wait for the table to say so."""
        self._stop(job_id, _cancelled)

    def pause(self, job_id: str) -> None:
        self._stop(job_id, _paused)

    def _stop(self, job_id: str, why: Callable[[Run], Exception]) -> None:
        for run in self._running.values():
            if run.job.id == job_id:
                run.stop(why(run))

    async def ended(self, job_id: str, timeout_s: float) -> Job:
        """The job when it has ended, or as it is after `timeout_s`. Whoever works on it, here or elsewhere."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not (job := await asyncio.to_thread(self._jobs.job, job_id)).has_ended:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
                return job
        return await asyncio.to_thread(self._jobs.job, job_id)

    async def close(self) -> None:
        """Give back what runs; the next start, or another process, begins it anew."""
        self._closing = True
        self.wake()
        if self._rounds is not None:
            await self._rounds  # not cancelled: what it claims at this moment would be nobody's
        for run in self._running.values():
            run.stop(_Stopped())
        if self._running:
            _, hanging = await asyncio.wait(list(self._running), timeout=STOP_S)
            for task in hanging:
                task.cancel()
            if hanging:
                await asyncio.wait(hanging)
        self._table.shutdown()

    async def _go_round(self) -> None:
        while not self._closing:
            try:
                await self._round()
            except Exception as error:  # a database that is away for a moment must not end all jobs to come
                log.error("looking after jobs failed", exc_info=error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), BEAT_S)
            self._woken.clear()

    def recover(self, silent_s: float = SILENT_S) -> None:
        """Take jobs away from workers that have been silent for so long."""
        for lost in self._jobs.recover(list(self._kinds), silent_s):
            log.warning("a job's worker was lost", extra={"job": lost.id, "state": lost.state})

    async def _round(self) -> None:
        await self._in_table(self.recover)
        for run in list(self._running.values()):
            await self._beat(run)
        while not self._closing and (wanted := self._kinds_with_room()):
            job = await self._in_table(self._jobs.claim, wanted, self._worker, self._server)
            if job is None:
                return
            run = Run(job, self._jobs, self._worker)
            task = asyncio.create_task(self._attempt(run))
            self._running[task] = run
            task.add_done_callback(self._gone)

    def _kinds_with_room(self) -> list[str]:
        running = [run.job.kind for run in self._running.values()]
        return [name for name, kind in self._kinds.items() if running.count(name) < kind.at_once]

    async def _beat(self, run: Run) -> None:
        try:
            job = await self._in_table(self._jobs.beat, run.job.id, self._worker, run.progress)
            if job.cancel_requested:
                run.stop(_cancelled(run))
            elif job.pause_requested:
                run.stop(_paused(run))
        except JobLost as lost:
            run.stop(lost)

    def _gone(self, task: asyncio.Task[None]) -> None:
        self._running.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a job could not be ended", exc_info=error)
        self.wake()

    async def _attempt(self, run: Run) -> None:
        log.info("job begun", extra={"job": run.job.id, "kind": run.job.kind, "attempt": run.job.attempts})
        try:
            ended = await self._end(run)
        except JobLost:
            log.warning("a job was lost to another worker", extra={"job": run.job.id})
            return
        log.info("job ended", extra={"job": ended.id, "kind": ended.kind, "state": ended.state})
        if ended.has_ended:
            self._on_end(ended)

    async def _end(self, run: Run) -> Job:
        mine = (run.job.id, self._worker)
        try:
            result = await self._kinds[run.job.kind].work(run)
        except JobCancelled:
            return await self._in_table(self._jobs.cancelled, *mine)
        except JobPaused:
            return await self._in_table(self._jobs.paused, *mine)
        except WorkerDied as died:
            return await self._in_table(self._jobs.interrupted, *mine, str(died))
        except JobLost:
            raise
        except (_Stopped, asyncio.CancelledError):
            return await self._in_table(self._jobs.release, *mine)
        except Exception as error:
            if not isinstance(error, (AdapterError, ServerError)):
                log.error("a job failed", exc_info=error, extra={"job": run.job.id})
            return await self._in_table(self._fail, *mine, error)
        return await self._in_table(self._jobs.finish, *mine, result, run.progress)

    def _fail(self, job_id: str, worker: str, error: Exception) -> Job:
        status, message, code = problems.told(error)
        param = getattr(error, "param", None)
        return self._jobs.fail(job_id, worker, code, message, status=status, **({"param": param} if param else {}))

    async def _in_table(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """Done also where whoever waits for it is cancelled before its turn: a job that is given back, above all."""
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._table, call, *arguments))


def _cancelled(run: Run) -> JobCancelled:
    return JobCancelled(f"{run.job.id} was asked to stop")


def _paused(run: Run) -> JobPaused:
    return JobPaused(f"{run.job.id} was asked to pause")
