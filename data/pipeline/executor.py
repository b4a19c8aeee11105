"""Running a stage on the processes of this machine, a Ray cluster or a Slurm cluster.

Tasks, completion marks, logs and statistics are datatrove's own. Who does the tasks is an `Executor`: the local one is
here, the others are `data.pipeline.on_ray` and `data.pipeline.on_slurm`. What differs from datatrove's: a worker that
is killed is noticed and its task repeated (a `multiprocessing.Pool` waits for it for ever), workers are kept from stage
to stage and never outlive the command, the terminal belongs to the progress bar, how far the tasks are is known while
they run, and what a task refuses to do reaches the user.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from copy import copy, deepcopy
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import PipelineStats
from loguru import logger

from config.errors import UserError
from config.files import is_remote
from config.schema import DataConfig

ATTEMPTS = 3  # one after the other in which no task gets done
POLL_SECONDS = 0.1
START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
QUIET = 1  # datatrove shows the log of local rank 0 on the terminal and keeps that of others in files
THREADS = ("POLARS_MAX_THREADS", "RAYON_NUM_THREADS", "OMP_NUM_THREADS")
DOCUMENTS = "documents"

logger.disable("datatrove")


def _nobody(documents: int) -> None:
    """Where progress goes when no one looks."""


_report: Callable[[int], None] = _nobody
_advanced = 0  # documents done by this process in all its life


class WorkersKilled(Exception):
    """Some tasks have not been done because those who did them were killed; they may be tried again."""


class Executor(Protocol):
    """Those who do the tasks. Leaving the `with` block by an exception ends what can be ended."""

    advice: str
    """What to do where workers are killed again and again."""

    def __enter__(self) -> Self:
        """Get hold of the workers; `UserError` where they are out of reach."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of them."""

    def tasks(self, stage: Stage, count: int, folder: Path) -> Any:
        """The tasks of a stage, as a datatrove executor whose logs and completion marks lie in `folder`."""

    def map(self, tasks: Any, ranks: Sequence[int], on_progress: Callable[[int], None]) -> None:
        """Do the tasks `ranks`. Raises what a task raised, and `WorkersKilled` where some could not be finished."""


def executor_for(data: DataConfig) -> Executor:
    """The executor that `data.executor` names."""
    if data.executor == "ray":
        from data.pipeline.on_ray import RayCluster

        return RayCluster(data.preprocess.workers, data.ray_address)
    if data.executor == "slurm":
        from data.pipeline.on_slurm import SlurmCluster

        return SlurmCluster(data.preprocess.workers, data.slurm)
    return Workers(data.preprocess.workers or available_cores())


class Stage(PipelineStep):  # type: ignore[misc]
    """One step of the pipeline: `work` does task `part` of `parts` and writes its results as whole files.

    What it writes depends on its inputs alone, so a task that was interrupted is simply done again.
    """

    type = "Quern"

    def work(self, part: int, parts: int) -> None:
        """Do one task; a stage's own work."""
        raise NotImplementedError

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """What datatrove calls."""
        logger.info("{} {} of {}", self.name, rank, world_size)
        before = _advanced
        try:
            self.work(rank, world_size)
        except BaseException:
            logger.opt(exception=True).info("failed")
            raise
        self.stat_update(DOCUMENTS, value=_advanced - before)
        logger.info("done")


def advance(documents: int) -> None:
    """Called by a stage: so many more documents are done."""
    global _advanced
    _advanced += documents
    _report(documents)


def documents_of(stats: PipelineStats) -> int:
    """The documents that a task advanced by; 0 of one that had been done before."""
    return sum(int(step.stats[DOCUMENTS].total) for step in stats.stats)


def log_folder(folder: Path) -> Any:
    """`folder` as datatrove takes it, with a storage's own settings."""
    remote: Any = folder
    return (remote.path, remote.fs) if is_remote(folder) else str(folder)


def use_one_thread() -> None:
    """Keep libraries from starting threads: the workers are the parallelism. Of use before they are first called."""
    for variable in THREADS:
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_stage(
    stage: Stage, tasks: int, workers: Executor, folder: Path, on_progress: Callable[[int], None] = _nobody
) -> None:
    """Do the tasks of `stage` that `folder` has no completion mark for.

    `on_progress` is called with the number of documents done since the last call. Raises whatever a task raised, after
    ending the others, and `UserError` when workers are killed again and again without finishing a task.
    """
    todo = workers.tasks(stage, tasks, folder)
    left, fruitless = todo.get_incomplete_ranks(), 0
    while left and fruitless < ATTEMPTS:
        before = len(left)
        try:
            workers.map(todo, left, on_progress)
            return
        except WorkersKilled:
            left = todo.get_incomplete_ranks()
            fruitless = fruitless + 1 if len(left) == before else 0
    if left:
        raise UserError(
            f"Worker processes were killed several times before one had done its part. {workers.advice} "
            "The finished parts are kept; the same command goes on with the others."
        )


class Tasks(LocalPipelineExecutor):  # type: ignore[misc]
    """The tasks of one stage; who runs them is up to an `Executor`."""

    def run_task(self, rank: int) -> int:
        """Run one task, with datatrove's log, statistics and completion mark; the documents that it did."""
        executor = copy(self)
        executor.pipeline = deepcopy(self.pipeline)  # the statistics of a step are those of its task alone
        return documents_of(executor._run_for_rank(rank, QUIET))


class Workers:
    """The processes that tasks run in: `count` of them, started when first needed; with one, this process itself.

    Leaving the `with` block by an exception ends them at once.
    """

    advice = "Most likely memory ran out: lower data.preprocess.workers or data.preprocess.batch_documents."

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None
        self._others = set(multiprocessing.active_children())
        self._context = multiprocessing.get_context(START_METHOD)
        self._done = self._context.Value("q", 0)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(at_once=error is not None)

    def tasks(self, stage: Stage, count: int, folder: Path) -> Tasks:
        """The tasks of `stage`."""
        return Tasks([stage], tasks=count, workers=self.count, logging_dir=log_folder(folder))

    def map(self, tasks: Tasks, ranks: Sequence[int], on_progress: Callable[[int], None]) -> None:
        """Do the tasks `ranks`; `WorkersKilled` if a worker was killed over one."""
        if self.count == 1:
            self._map_here(tasks, ranks, on_progress)
            return
        seen = self._done.value
        try:
            pool = self._start()
            futures: set[Future[int]] = {pool.submit(tasks.run_task, rank) for rank in ranks}
            while futures:
                done, futures = wait(futures, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION)
                value = self._done.value
                on_progress(value - seen)
                seen = value
                for future in done:
                    future.result()
        except BrokenProcessPool as error:
            self._end(at_once=True)
            raise WorkersKilled from error
        except BaseException:
            self._end(at_once=True)
            raise

    def _map_here(self, tasks: Tasks, ranks: Sequence[int], on_progress: Callable[[int], None]) -> None:
        global _report
        _report = on_progress
        try:
            for rank in ranks:
                tasks.run_task(rank)
        finally:
            _report = _nobody

    def _start(self) -> ProcessPoolExecutor:
        if self._pool is None:
            use_one_thread()
            if START_METHOD == "forkserver":
                self._context.set_forkserver_preload(["__main__", "data.pipeline.stages"])
            self._pool = ProcessPoolExecutor(
                self.count, mp_context=self._context, initializer=_start_worker, initargs=(self._done,)
            )
        return self._pool

    def _end(self, at_once: bool) -> None:
        if self._pool is None:
            return
        pool, self._pool = self._pool, None
        pool.shutdown(wait=not at_once, cancel_futures=True)
        if at_once:
            for process in set(multiprocessing.active_children()) - self._others:
                process.terminate()
                process.join()


def _start_worker(done: Synchronized[int]) -> None:
    """Prepare a worker: Ctrl-C is the parent's to handle, and the parent's end is the worker's."""
    global _report

    def count(documents: int) -> None:
        with done.get_lock():
            done.value += documents

    _report = count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()
