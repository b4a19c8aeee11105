"""Runs that lose a process or a machine, and go on by themselves: two launchers on loopback, and `kill -9`."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.commands import here
from tests.small_runs import ROOT, SMALL, TRAIN, curve, finish, start, wait_for, write_corpus
from tests.test_distributed import DISTRIBUTED, TWO

SETTINGS = [
    *SMALL,
    "training.optimizer=adamw",
    "training.schedule.name=constant",
    "training.max_steps=150",
    "training.checkpoint_interval=20",
    "training.eval_interval=1000",
    "training.log_interval=10",
    "training.keep_best=false",
]


class TestNames:
    def test_resume_auto_needs_the_name_of_the_run(self, tmp_path: Path) -> None:
        done = here(tmp_path, TRAIN, "--resume", "auto", *SMALL, status=1)
        assert done.stderr == "error: --resume auto goes on with the run of one name: set training.run_name=NAME.\n"

    def test_restarts_go_on_with_the_runs_own_checkpoint_alone(self, tmp_path: Path) -> None:
        given = [*TWO, "--max-restarts", "1", *SMALL]
        done = here(tmp_path, DISTRIBUTED, *given, "--resume", "latest", status=1)
        assert "not from --resume latest" in done.stderr
        meeting = ["--nodes", "2", "--rendezvous", "localhost:29400"]
        done = here(tmp_path, DISTRIBUTED, *given, *meeting, status=1)
        assert "on several machines needs a name that all of them know: training.run_name=NAME" in done.stderr


class TestSlurm:
    def test_the_script_starts_the_run_and_goes_back_into_the_queue(self, tmp_path: Path) -> None:
        """The script of docs/cluster.md under commands of Slurm that write down what they are asked."""
        page = (ROOT / "docs/cluster.md").read_text().split("## Training on Slurm")[1]
        (script,) = re.findall(r"```sh\n(.*?)```", page.split("\n## ")[0], re.DOTALL)
        (tmp_path / ".venv/bin").mkdir(parents=True)
        (tmp_path / ".venv/bin/activate").touch()
        (tmp_path / "train.sbatch").write_text(script)
        asked = tmp_path / "asked"
        for name, does in (("srun", "exit 143"), ("scontrol", "if [ $1 = show ]; then echo one; echo two; fi")):
            (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {asked}\n{does}\n')
            (tmp_path / name).chmod(0o755)
        slurm = {"SLURM_JOB_NODELIST": "one,two", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
        environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        subprocess.run(["bash", "train.sbatch"], cwd=tmp_path, env=environment, check=True)

        listed, started, requeued = asked.read_text().splitlines()
        assert (listed, requeued) == ("scontrol show hostnames one,two", "scontrol requeue 7")
        words = started.split()[started.split().index("python") + 1 :]
        assert words[1:5] == ["--gpus", "8", "--nodes", "2"] and "one:29400" in words
        (tmp_path / "config").symlink_to(ROOT / "config")
        printed = here(tmp_path, DISTRIBUTED, *words[1:], "--print-config").stdout
        assert "run_name: modern-1b" in printed and "parallelism: hsdp" in printed


@pytest.mark.slow
class TestLosses:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A corpus, and an undisturbed run of one process, `calm`."""
        write_corpus(tmp_path)
        here(tmp_path, TRAIN, *SETTINGS, "training.run_name=calm", "training.checkpoint_dir=calm")
        return tmp_path

    def test_a_killed_process_and_then_a_killed_machine_are_made_good(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        meeting = ["--nodes", "2", "--rendezvous", f"127.0.0.1:{port}"]
        own = ["training.run_name=hit", "training.checkpoint_dir=hit", "--max-restarts", "3"]
        launch = ["--gpus", "1", "--device", "cpu", *meeting, *own, *SETTINGS]
        first = start(folder, "distributed_train", *launch, "--node-rank", "0")
        wait_for(lambda: answers(port), first)  # the machine where all meet must live on
        second = start(folder, "distributed_train", *launch, "--node-rank", "1")

        wait_for(lambda: newest(folder / "hit") >= 20, first)
        worker(second).kill()
        wait_for(lambda: newest(folder / "hit") >= 60, first)
        lost = worker(second)
        second.kill()
        lost.kill()
        finish(second)
        second = start(folder, "distributed_train", *launch, "--node-rank", "1")

        done = [finish(process) for process in (first, second)]
        assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
        begun = [each["from_step"] for each in json.loads((folder / "runs/hit/environment.json").read_text())]
        assert len(begun) == 3 and 20 <= begun[1] < 60 <= begun[2] < 150
        rows, wanted = (curve(folder / "runs" / name) for name in ("hit", "calm"))
        assert [row[0] for row in rows] == [row[0] for row in wanted]
        assert [row[2] for row in rows] == pytest.approx([row[2] for row in wanted], rel=2e-3)


def answers(port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def newest(directory: Path) -> int:
    """The highest step with a checkpoint."""
    return max((int(path.stem.split("_")[-1]) for path in directory.glob("model_step_*.pt")), default=0)


def worker(launcher: subprocess.Popen[str]) -> psutil.Process:
    """The process that trains for `launcher`."""
    (found,) = (child for child in psutil.Process(launcher.pid).children() if "train.py" in " ".join(child.cmdline()))
    return found
