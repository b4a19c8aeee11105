"""Tasks on a Slurm cluster, through datatrove's Slurm executor: for each stage one array of jobs.

The command submits a stage, waits for it, and submits the next. The jobs do not need it: where it ends, they go on, and
the same command finds them by their name, waits for them and goes on. Jobs that were killed or ran out of time are
followed by others for the tasks that are left.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.utils.stats import MetricStats, PipelineStats

from config.errors import UserError
from config.schema import SlurmConfig
from data.pipeline.executor import DOCUMENTS, THREADS, Stage, WorkersKilled, log_folder

JOBS = 100
FAILURES = "failures"
FIRST_PAUSE = 0.2  # seconds until Slurm is asked again; ever longer while nothing happens
LONGEST_PAUSE = 15.0


class TaskFailed(Exception):
    """A task raised something that is not the user's fault; the message is its traceback."""


class SlurmTasks(SlurmPipelineExecutor):  # type: ignore[misc]
    """The tasks of one stage, submitted together; a task that raises leaves a note of it."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        tasks = copy(self)
        tasks.pipeline = deepcopy(self.pipeline)  # a job does several tasks, of which each has statistics of its own
        try:
            return super(SlurmTasks, tasks)._run_for_rank(rank, local_rank, node_rank)
        except Exception as error:
            import traceback

            fault = str(error) if isinstance(error, UserError) else None
            note = {"fault": fault, "traceback": "".join(traceback.format_exception(error))}
            with self.logging_dir.open(_note(rank), "w") as file:
                json.dump(note, file)
            raise

    def check_failed(self, ranks: Sequence[int]) -> None:
        """Raise what the first of the tasks `ranks` that failed raised, if any did."""
        notes = set(self.logging_dir.list_files(FAILURES)) if self.logging_dir.isdir(FAILURES) else set()
        for rank in ranks:
            if _note(rank) in notes:
                note = json.loads(self.logging_dir.cat_file(_note(rank)))
                raise UserError(note["fault"]) if note["fault"] else TaskFailed(note["traceback"])

    def forget_failed(self) -> None:
        """Remove the notes of earlier attempts."""
        if self.logging_dir.isdir(FAILURES):
            self.logging_dir.rm(FAILURES, recursive=True)

    def documents(self, ranks: Sequence[int]) -> int:
        """Documents of the finished tasks `ranks`."""
        texts = [self.logging_dir.cat_file(f"stats/{rank:05d}.json") for rank in ranks]
        counts = [step["stats"].get(DOCUMENTS, 0) for text in texts for step in json.loads(text)]
        return sum(int(MetricStats.from_dict(count).total) for count in counts)

    def get_distributed_env(self, node_rank: int = -1) -> Any:
        """Nothing that a task here asks for; datatrove's own asks Slurm for the names of all nodes."""
        names = ("node_ips", "cpus_per_task", "mem_per_cpu", "gpus_on_node", "executor")
        return dict.fromkeys([f"datatrove_{name}" for name in names], "")

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        """datatrove's, without those that the configuration leaves to the cluster."""
        return {name: value for name, value in super().get_sbatch_args(max_array).items() if value is not None}

    def launch_merge_stats(self) -> None:
        """No further job for that."""


def _note(rank: int) -> str:
    return f"{FAILURES}/{rank:05d}.json"


class SlurmCluster:
    """The cluster whose `sbatch` is on the path.

    Args:
        count: jobs of a stage, each for an equal share of its tasks, or None for 100.
        config: what each job asks for.
    """

    advice = "The jobs' logs say why; raise data.slurm.memory_gb or data.slurm.time_hours, or mend data.slurm.setup."

    def __init__(self, count: int | None, config: SlurmConfig) -> None:
        self.count = count or JOBS
        self.config = config

    def __enter__(self) -> Self:
        _call("sbatch", "--version")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is KeyboardInterrupt:
            raise UserError(
                "Stopped waiting; the submitted jobs go on. Type the same command again to continue with them, "
                "or end them with scancel."
            ) from error

    def tasks(self, stage: Stage, count: int, folder: Path) -> SlurmTasks:
        """The tasks of `stage` as a job array whose name is the same in every attempt."""
        config = self.config
        minutes = math.ceil(config.time_hours * 60)
        name = f"quern-{stage.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
        threads = " ".join(f"{variable}={config.cpus}" for variable in THREADS)
        path = shlex.quote(str(Path(sys.executable).parent))
        lines = [f"export PATH={path}:$PATH {threads} TOKENIZERS_PARALLELISM=false", *config.setup]
        return SlurmTasks(
            [stage],
            tasks=count,
            time=f"{minutes // 60}:{minutes % 60:02d}:00",
            partition=config.partition,
            cpus_per_task=config.cpus,
            job_name=name,
            qos=None,
            env_command="; ".join(lines),
            sbatch_args={"mem-per-cpu": f"{math.ceil(config.memory_gb * 1024 / config.cpus)}M", **config.options},
            logging_dir=log_folder(folder),
        )

    def map(self, tasks: SlurmTasks, ranks: Sequence[int], on_progress: Callable[[int], None]) -> None:
        """Wait for the jobs that do the tasks, after submitting them where there are none."""
        name = tasks.job_name
        tasks.forget_failed()
        if _queued(name):
            _say(f"Slurm is still at work on {name}.")
        else:
            tasks.tasks_per_job = math.ceil(len(ranks) / self.count)
            try:
                tasks.launch_job()
            except subprocess.CalledProcessError as error:
                raise UserError("Slurm refused the jobs and said above why. Change data.slurm.") from error
            jobs = math.ceil(len(ranks) / tasks.tasks_per_job)
            _say(f"Submitted {name}: {len(ranks)} tasks in {jobs} jobs, the last array is {tasks.job_id}.")
        _say(f"Look with squeue --name {name}, end them with scancel --name {name}, read {tasks.slurm_logs_folder}")
        _wait(tasks, list(ranks), on_progress)


def _wait(tasks: SlurmTasks, left: list[int], on_progress: Callable[[int], None]) -> None:
    pause = FIRST_PAUSE
    while True:
        over = not _queued(tasks.job_name)  # asked before the marks are looked at, so that none is missed
        now = tasks.get_incomplete_ranks(left)
        done = sorted({*left} - {*now})
        on_progress(tasks.documents(done))
        left = now
        try:
            tasks.check_failed(left)
        except BaseException:
            _call("scancel", "--name", tasks.job_name)
            raise
        if not left:
            return
        if over:
            raise WorkersKilled
        pause = FIRST_PAUSE if done else min(1.5 * pause, LONGEST_PAUSE)
        time.sleep(pause)


def _queued(name: str) -> bool:
    """Whether jobs of this name wait or run; also when Slurm does not answer, since then they may."""
    done = _call("squeue", "--noheader", "--user", getpass.getuser(), "--name", name, "--format=%A")
    return done.returncode != 0 or bool(done.stdout.strip())


def _call(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(
            f"data.executor=slurm needs the command {words[0]}, which is not here. Type this on a node of the Slurm "
            "cluster that may submit jobs, or set data.executor=local."
        ) from error


def _say(text: str) -> None:
    print(text, flush=True)
