"""Preprocessing on Ray and Slurm clusters: the same bytes as on one machine, whatever is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from config.errors import UserError
from config.load import load_config
from config.schema import SlurmConfig
from data.pipeline.executor import Executor, run_stage
from data.pipeline.on_ray import RayCluster
from data.pipeline.on_slurm import SlurmCluster, TaskFailed
from tests import slurm_commands
from tests.commands import here
from tests.recorder import Recorder
from tests.test_preprocess import ROOT, SETTINGS, checksums, run, sentences, write_corpus

SLURM = load_config([], ["data.slurm.time_hours=1.5", "data.slurm.memory_gb=3"]).data.slurm


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, a tokenizer, and token files made by one process."""
    folder = tmp_path_factory.mktemp("one-machine")
    write_corpus(folder, sentences(300), bad_lines=["no json"])
    here(folder, "data/tokenizer.py", *SETTINGS)
    run(folder)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The same without token files."""
    for name in ("raw", "tokenizer"):
        shutil.copytree(finished / "corpus" / name, tmp_path / "corpus" / name)
    return tmp_path


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a Slurm cluster's commands, which are on the path."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the jobs unpickle stages of the tests
    folder = slurm_commands.install(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    yield folder
    slurm_commands.cancel(folder)


def on_cluster(kind: str, request: pytest.FixtureRequest) -> Callable[[], Executor]:
    """What makes an executor of that kind."""
    if kind == "ray":
        address = request.getfixturevalue("ray_address")
        return lambda: RayCluster(None, address)
    request.getfixturevalue("slurm")
    return lambda: SlurmCluster(2, SLURM)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ray", "slurm"])
class TestStages:
    def test_every_task_once_and_a_second_run_does_nothing(
        self, kind: str, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        progress: list[int] = []
        stage, executor = Recorder(tmp_path), on_cluster(kind, request)
        for _ in range(2):
            with executor() as workers:
                run_stage(stage, 4, workers, tmp_path / "log", progress.append)
        assert [stage.calls(part) for part in range(4)] == [1] * 4
        assert sum(progress) == 40

    def test_what_a_task_refuses_reaches_the_caller_and_is_tried_again_later(
        self, kind: str, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        executor = on_cluster(kind, request)
        with pytest.raises(UserError) as refused, executor() as workers:
            run_stage(Recorder(tmp_path, "refuses"), 4, workers, tmp_path / "log")
        assert str(refused.value) == "part 2 is not to be had"
        with executor() as workers:
            run_stage(Recorder(tmp_path), 4, workers, tmp_path / "log")
        assert Recorder(tmp_path).calls(2) == 2

    def test_the_task_of_a_killed_worker_is_repeated(
        self, kind: str, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        stage = Recorder(tmp_path, "dies once")
        with on_cluster(kind, request)() as workers:
            run_stage(stage, 4, workers, tmp_path / "log")
        assert [stage.calls(part) for part in range(4)] == [1, 1, 2, 1]


def start(folder: Path, *settings: str) -> subprocess.Popen[str]:
    """Start the command."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "data/preprocess.py"), *SETTINGS, *settings],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """What the condition gives as soon as that is true; the process must be there until then."""
    deadline = time.monotonic() + 100
    while not (found := condition()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


class TestRay:
    def on(self, address: str) -> tuple[str, ...]:
        return ("data.executor=ray", f"data.ray_address={address}", "data.preprocess.workers=null")

    @pytest.mark.slow
    def test_the_same_bytes_after_a_worker_is_killed(self, finished: Path, copy: Path, ray_address: str) -> None:
        process = start(copy, *self.on(ray_address), "data.preprocess.tasks=6")
        worker = wait_for(self.worker, process)
        worker.kill()
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output
        assert checksums(copy) == checksums(finished)

    @staticmethod
    def worker() -> psutil.Process | None:
        """A process of the cluster, which this one has started, that is at work on a task."""
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if any("ray::run_task" in word for word in process.cmdline()):
                    return process
        return None

    @pytest.mark.slow
    def test_the_same_bytes_from_one_worker_at_a_time(self, finished: Path, copy: Path, ray_address: str) -> None:
        run(copy, *self.on(ray_address), "data.preprocess.workers=1", "data.preprocess.tasks=2")
        assert checksums(copy) == checksums(finished)

    def test_without_ray(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(UserError, match=r"pip install -e '\.\[ray\]'"), RayCluster(None, "auto"):
            pass

    def test_without_a_cluster(self) -> None:
        with pytest.raises(UserError, match="no Ray cluster at data.ray_address=127.0.0.1:1"):
            RayCluster(None, "127.0.0.1:1").__enter__()


class TestSlurm:
    @pytest.mark.slow
    def test_the_same_bytes_though_the_command_was_killed(self, finished: Path, copy: Path, slurm: Path) -> None:
        """What was submitted goes on; the same command finds it, and neither does nor submits it again."""
        settings = ["data.executor=slurm", "data.preprocess.workers=2", "data.preprocess.tasks=2"]
        settings += ["data.slurm.partition=cpu", "data.slurm.options={account: llm}"]
        settings += ["data.slurm.setup=['until [ -e go ]; do sleep 0.1; done', export A=1]"]
        process = start(copy, *settings)
        (job,) = wait_for(lambda: slurm_commands.jobs(slurm), process)
        wait_for(lambda: (job / "group").exists(), process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        process = start(copy, *settings)
        assert process.stdout is not None
        name = slurm_commands.directives(job)["job-name"]
        assert process.stdout.readline() == f"Slurm is still at work on {name}.\n"
        (copy / "go").touch()
        output, _ = process.communicate(timeout=900)
        assert checksums(copy) == checksums(finished)
        assert [slurm_commands.directives(job)["job-name"].split("-")[1] for job in slurm_commands.jobs(slurm)] == [
            "clean",
            "tokenize",
            "write",
        ]
        assert "squeue --name quern-tokenize-" in output and "scancel --name quern-write-" in output
        wanted = {"partition": "cpu", "account": "llm", "time": "24:00:00", "mem-per-cpu": "4096M", "array": "0-1"}
        assert wanted.items() <= slurm_commands.directives(job).items()
        script = (job / "script").read_text()
        assert "; export A=1\n" in script and "POLARS_MAX_THREADS=1" in script

    def test_what_is_left_to_the_cluster_is_not_in_the_script(self, slurm: Path, tmp_path: Path) -> None:
        with SlurmCluster(3, SLURM) as workers:
            tasks = workers.tasks(Recorder(tmp_path), 7, tmp_path / "log")
        options = tasks.get_sbatch_args(3)
        assert "partition" not in options and "qos" not in options
        assert (options["time"], options["mem-per-cpu"], options["array"]) == ("1:30:00", "3072M", "0-2")

    def test_a_bug_in_a_task_shows_its_traceback(self, tmp_path: Path) -> None:
        tasks = SlurmCluster(1, SLURM).tasks(Recorder(tmp_path / "nowhere"), 1, tmp_path / "log")
        with pytest.raises(FileNotFoundError):
            tasks._run_for_rank(0)
        with pytest.raises(TaskFailed, match="No such file or directory.*0.calls"):
            tasks.check_failed([0])

    def test_refused_jobs(self, slurm: Path, tmp_path: Path) -> None:
        nowhere: SlurmConfig = SLURM.model_copy(update={"partition": "nowhere"})
        with pytest.raises(UserError, match="Slurm refused the jobs"), SlurmCluster(2, nowhere) as workers:
            run_stage(Recorder(tmp_path), 4, workers, tmp_path / "log")

    def test_without_slurm(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(UserError, match="needs the command sbatch"), SlurmCluster(2, SLURM):
            pass

    def test_stopped_while_it_waits(self, slurm: Path) -> None:
        with pytest.raises(UserError, match="the submitted jobs go on"), SlurmCluster(2, SLURM):
            raise KeyboardInterrupt
