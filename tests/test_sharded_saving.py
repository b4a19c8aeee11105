"""Checkpoints of sharded runs, written beside the training: two processes over gloo, whoever dies on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model.checkpoint_folder import latest_checkpoint, list_checkpoints
from tests.small_runs import ROOT

TOGETHER = """
import os, random, signal, socket, sys, time
from pathlib import Path
from config.files import exclusive
from model.checkpoint import load_checkpoint
from model.checkpoint_folder import latest_checkpoint, list_checkpoints
from tests.small_runs import RandomSamples, train_here

source = RandomSamples(32, 32)
settings = ["training.parallelism=fsdp", "training.micro_batch_size=4", "training.checkpoint_interval=1",
            "training.keep_last=9", "training.eval_interval=1000", "training.keep_best=false"]

def start(*own, resume=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            status = 1
            try:
                os.setsid()
                os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
                train_here(source, *settings, *own, resume=resume)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    return children

def run(*own):
    for child in start(*own):
        assert os.waitpid(child, 0)[1] == 0
"""

ALIKE = f"""{TOGETHER}
for way in ("true", "false"):
    run(f"training.save_in_background={{way}}", f"training.checkpoint_dir=in-{{way}}", f"training.run_name=in-{{way}}")
"""

KILLED = f"""{TOGETHER}
folder = Path("part")
settings += ["model.d_model=256", "training.save_in_background=true", "training.schedule.name=constant"]
part = ["training.run_name=part", "training.checkpoint_dir=part", "training.max_steps=100000"]
chance, reached = random.Random(int(sys.argv[1])), 0
for number in range(int(sys.argv[2])):
    children = start(*part, resume=latest_checkpoint(folder) if reached else None)
    while not any(step > reached for step, _ in list_checkpoints(folder)):
        for child in children:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended by itself"
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.25))
    chance.shuffle(children)
    for child in children:
        kill = os.kill if number % 2 else os.killpg  # its writer goes on, or dies as well
        kill(child, signal.SIGKILL)
        time.sleep(chance.choice([0, 0.05]))
    for child in children:
        os.waitpid(child, 0)
    with exclusive(folder / "latest", "the writer goes on", patience=60):  # a writer that was spared has ended
        for _, path in list_checkpoints(folder):
            load_checkpoint(path)
        reached = load_checkpoint(latest_checkpoint(folder))["step"]
run("training.run_name=whole", "training.checkpoint_dir=whole", f"training.max_steps={{reached}}")
print(reached)
"""

DIRECTLY = """
import os, resource, sys, time
from functools import partial
from pathlib import Path
import psutil, torch
from model.checkpoint import load_model
from model.checkpoint_folder import latest_checkpoint
from tests.small_runs import small_config
from training.background import PROGRAM
from training.console import Console
from training.distributed import open_process
from training.layout import make_layout
from training.parallelism import deal
from training.precision import Precision
from training.record import Record
from training.setup import new_model
from training.sharded_saving import ShardedSaving

config = small_config("training.parallelism=fsdp", "training.save_in_background=true", "training.keep_last=9")
said = []
with open_process("cpu") as process:
    layout = make_layout(config, process.world_size)
    spread = partial(deal, layout=layout, process=process, precision=Precision("fp32", process.device))
    model = new_model(config, process.device, spread)
    record = Record(config, Path("runs/run"), Console(enabled=False), {}) if process.is_main else None
    saving = ShardedSaving(config.training, process, record, said.append)

    def state(step):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
        return {"model": model.state_dict(), "step": step, "validation_loss": None}

    def tend():
        busy = bool(process.largest(int(saving.busy)))
        saving.tend(lambda: state(0), busy)
        return busy

    def written(step):
        while tend():
            time.sleep(0.01)
        while process.largest(int(process.is_main and record.checkpoints._background.busy)):
            tend()
        return Path(f"checkpoints/model_step_{step}").is_dir()

    def holds(step):
        model, info = load_model(latest_checkpoint(Path("checkpoints")))
        assert info.step == step and info.run_name == "run"
        assert all(torch.equal(value, torch.full_like(value, step)) for value in model.state_dict().values())

    def own_writer():  # the main one has two, of which one finishes checkpoints
        (found,) = [child for child in psutil.Process().children() if PROGRAM in child.cmdline()]
        return found

    tend()
    second = process.rank == 1
    if second:
        own_writer().suspend()
    assert saving.save(state(1), final=False) is None
    saving.settle()
    state(99)  # what changes after the step does not reach the file
    for _ in range(20):
        assert tend(), "all know that one of them is not done"
        time.sleep(0.01)
    assert not Path("checkpoints/model_step_1").exists()
    if second:
        own_writer().resume()
    assert written(1)
    holds(1)

    limits = resource.RLIM_INFINITY, resource.RLIM_INFINITY
    if second:
        resource.prlimit(own_writer().pid, resource.RLIMIT_FSIZE, (4096, limits[1]))
    assert saving.save(state(2), final=False) is None
    saving.settle()
    assert not written(2)
    holds(1)
    if process.is_main:
        assert len(said) == 1 and said[0].startswith("warning: No space left while writing checkpoints/.model_step_2.")
        assert "__1_0.distcp" in said[0] and said[0].endswith("tries again at the next checkpoint.")
        assert {path.name for path in Path("checkpoints").iterdir()} == {"model_step_1", "latest", ".latest.lock"}
    if second:
        resource.prlimit(own_writer().pid, resource.RLIMIT_FSIZE, limits)

    if second:
        first = own_writer()
        first.suspend()
        assert saving.save(state(3), final=False) is None
        saving.settle()
        first.kill()
    else:
        assert saving.save(state(3), final=False) is None
        saving.settle()
    assert written(3)
    holds(3)
    assert len(said) == 1
    assert saving.save(state(4), final=True) is None
    process.largest(0)
    holds(4)
    saving.close()
    if record is not None:
        record.close()
    print("all of it is true")
"""


def python(folder: Path, program: str, *arguments: str, launcher: tuple[str, ...] = ("-c",)) -> str:
    """What a program prints that ends well."""
    done = subprocess.run(
        [sys.executable, *launcher, program, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{arguments}: {done.stderr}"
    return done.stdout


def checksums(checkpoint: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((checkpoint / "checksums.json").read_text())
    assert found.keys() == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    return found


@pytest.mark.slow
class TestTwoProcesses:
    def test_write_the_same_beside_the_training_as_within_its_steps(self, tmp_path: Path) -> None:
        python(tmp_path, ALIKE)
        found = list_checkpoints(tmp_path / "in-true")
        assert [step for step, _ in found] == list(range(1, 9))
        for _, path in found:
            assert checksums(path) == checksums(tmp_path / "in-false" / path.name)

    def test_agree_on_what_came_of_a_save_without_waiting_for_it(self, tmp_path: Path) -> None:
        """One of them is slow, then out of space, then without its writer."""
        (tmp_path / "program.py").write_text(DIRECTLY)
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        assert python(tmp_path, "program.py", launcher=launcher) == 2 * "all of it is true\n"

    def test_killed_at_random_moments_leave_a_whole_checkpoint_and_go_on(self, tmp_path: Path) -> None:
        """One after the other, with their writers or without; in the end it is the same run."""
        seed = str(int(time.time()))
        step = int(python(tmp_path, KILLED, seed, "10"))
        part, whole = (tmp_path / way / f"model_step_{step}" for way in ("part", "whole"))
        assert latest_checkpoint(tmp_path / "part") == part
        assert checksums(part) == checksums(whole), f"seed {seed}"
