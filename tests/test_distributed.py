"""Several processes over gloo on the CPU: the same training as one process, through the real launcher."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from config.errors import UserError
from model.checkpoint_folder import latest_checkpoint
from tests.commands import here
from tests.small_runs import (
    ROOT,
    SMALL,
    TRAIN,
    RandomSamples,
    command,
    curve,
    finish,
    metrics,
    read_checkpoint,
    start,
    train_here,
    wait_for,
    write_corpus,
)
from training.launch import Machines

SETTINGS = [*SMALL, "training.max_steps=6", "training.checkpoint_interval=3", "training.optimizer=adamw"]
DISTRIBUTED, TWO = "scripts/distributed_train.py", ["--gpus", "2", "--device", "cpu"]

MASKED_RUN = "import sys; from tests.test_distributed import masked_run; masked_run(*sys.argv[1:])"


def masked_run(*settings: str) -> None:
    """A run over samples of which some have no valid token at all."""
    source = RandomSamples(32, 32, lambda row: slice(0, (row * 13) % 33) if row % 5 else slice(None))
    train_here(source, *settings, "training.max_steps=6", "training.optimizer=adamw")


class TestMistakes:
    """One sentence, once, before any process is started."""

    @pytest.mark.skipif(torch.cuda.device_count() >= 64, reason="there are that many GPUs")
    def test_too_few_gpus(self, tmp_path: Path) -> None:
        done = here(tmp_path, DISTRIBUTED, "--gpus", "64", status=1)
        assert done.stderr.count("error:") == 1
        assert f"PyTorch finds {torch.cuda.device_count()} GPU" in done.stderr
        assert "--device cpu" in done.stderr

    def test_a_batch_that_cannot_be_dealt(self, tmp_path: Path) -> None:
        write_corpus(tmp_path)
        done = here(tmp_path, DISTRIBUTED, "--gpus", "3", "--device", "cpu", *SETTINGS, status=1)
        assert done.stderr.splitlines() == [
            "error: training.batch_size=8 cannot be dealt evenly to 3 processes; choose a multiple of 3."
        ]
        assert not (tmp_path / "runs").exists()

    def test_machines_that_cannot_meet(self) -> None:
        with pytest.raises(UserError, match="--nodes 2 needs --rendezvous HOST:PORT"):
            Machines(4, nodes=2)
        with pytest.raises(UserError, match="--node-rank 2 must lie between 0 and 1"):
            Machines(4, nodes=2, node_rank=2, rendezvous="localhost:29400")


@pytest.mark.slow
class TestTwoProcesses:
    def test_train_what_one_process_trains(self, tmp_path: Path) -> None:
        """Promise 3: one process, two, and two that also accumulate; with documents that do not see one another."""
        write_corpus(tmp_path, ends=[30, 500, 507, 1400, 4000])
        documents = ["data.loader.packing=best_fit", "training.documents=masked"]
        ways = {
            "one": (TRAIN, []),
            "two": ("distributed_train", TWO),
            "both": ("distributed_train", [*TWO, "training.micro_batch_size=2"]),
        }
        for name, (script, arguments) in ways.items():
            own = [f"training.run_name={name}", f"training.checkpoint_dir={name}"]
            run = command if arguments else here
            done = run(tmp_path, script, *arguments, *SETTINGS, *documents, *own)
            assert done.stdout.count("Wrote ") == done.stdout.count("packed into") == 1
        expected = read_checkpoint(tmp_path / "one/model_step_6.pt")
        for name in ("two", "both"):
            found = read_checkpoint(tmp_path / name / "model_step_6.pt")
            torch.testing.assert_close(found["model"], expected["model"], rtol=1e-4, atol=2e-5)
            assert found["cursor"] == expected["cursor"] == 48
            rows, expected_rows = (curve(tmp_path / "runs" / which) for which in (name, "one"))
            for row, wanted in zip(rows, expected_rows, strict=True):
                assert [value or 0 for value in row] == pytest.approx([value or 0 for value in wanted], rel=1e-4)

    def test_weigh_masked_tokens_as_one_process_does(self, tmp_path: Path) -> None:
        """Promise 4: counts of valid tokens that differ between processes and micro-batches, some of them zero."""
        script = tmp_path / "masked_run.py"
        script.write_text(MASKED_RUN)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        own = {
            name: [f"training.checkpoint_dir={name}", f"training.run_name={name}", "training.micro_batch_size=2"]
            for name in ("one", "two")
        }
        with contextlib.chdir(tmp_path):
            masked_run(*own["one"])
        run_python(tmp_path, *launcher, str(script), *own["two"])
        one, two = (read_checkpoint(tmp_path / name / "model_step_6.pt") for name in ("one", "two"))
        torch.testing.assert_close(two["model"], one["model"], rtol=1e-4, atol=2e-5)
        losses = [[row["loss"] for row in metrics(tmp_path / "runs" / name)] for name in ("one", "two")]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)

    def test_save_on_a_signal_and_go_on_as_one_process(self, tmp_path: Path) -> None:
        write_corpus(tmp_path)
        long = [*SETTINGS, "training.max_steps=100000", "training.checkpoint_interval=100000", "training.run_name=cut"]
        process = start(tmp_path, "distributed_train", *TWO, *long)
        wait_for(lambda: bool(psutil.Process(process.pid).children()), process)
        while not (tmp_path / "runs/cut").exists():  # which they are too early for
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.02)
        wait_for((tmp_path / "runs/cut/metrics.jsonl").exists, process)
        process.send_signal(signal.SIGUSR1)
        wait_for(lambda: any((tmp_path / "checkpoints").glob("*.pt")), process)
        process.send_signal(signal.SIGTERM)
        done = finish(process)
        assert done.returncode == 143, done.stderr
        checkpoint = latest_checkpoint(tmp_path / "checkpoints")
        assert len(list((tmp_path / "checkpoints").glob("*.pt"))) == 2
        step = read_checkpoint(checkpoint)["step"]
        assert f"Stopped by SIGTERM after step {step:,} of 100,000" in done.stdout
        assert done.stdout.splitlines()[-1].endswith(
            f"python scripts/distributed_train.py --gpus 2 --resume checkpoints/{checkpoint.name}"
        )
        more = ["--resume", "latest", f"training.max_steps={step + 4}"]
        assert f"step {step + 4}" in command(tmp_path, "distributed_train", "--gpus", "2", *more).stderr
        more = ["--resume", "latest", f"training.max_steps={step + 8}"]
        assert f"step {step + 8}" in here(tmp_path, TRAIN, *more).stderr

    def test_pass_on_the_status_of_one_that_fails(self, tmp_path: Path) -> None:
        write_corpus(tmp_path)
        (tmp_path / "runs").write_text("a file where a folder is wanted")
        done = command(tmp_path, "distributed_train", *TWO, *SETTINGS, "training.run_name=none", status=1)
        assert done.stderr == "error: May not write runs/none/config.yaml: Not a directory. Choose another folder.\n"

    def test_end_when_one_of_them_is_killed(self, tmp_path: Path) -> None:
        write_corpus(tmp_path)
        process = start(tmp_path, "distributed_train", *TWO, *SETTINGS, "training.max_steps=100000")
        wait_for(lambda: any(tmp_path.glob("runs/*/metrics.jsonl")), process)
        psutil.Process(process.pid).children()[-1].kill()
        done = finish(process)
        assert done.returncode == 137
        assert "was killed by SIGKILL" in done.stderr and "Traceback" not in done.stderr


def run_python(folder: Path, *arguments: str) -> None:
    """Run this interpreter in `folder` with the project on its path."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=900,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
