"""scripts/sweep.py on a Ray cluster: a run for each core, ordinary ones, that survive the loss of their worker."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from config.errors import UserError
from tests.small_runs import command, finish, metrics, start, wait_for, write_corpus
from tests.test_sweep import write
from training.on_ray import places_on_ray


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--ray auto needs Ray, .*pip install -e '\.\[ray\]'"):
        places_on_ray("auto", 1, None).__enter__()


def test_without_a_cluster() -> None:
    with pytest.raises(UserError, match="no Ray cluster at --ray 127.0.0.1:1"):
        places_on_ray("127.0.0.1:1", 1, None).__enter__()


def run_of(name: str) -> psutil.Process | None:
    """The process of the run of that name, if it is there; other tests have runs of that name, too."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if f"training.run_name={name}" in process.cmdline():
                return process
    return None


@pytest.mark.slow
class TestCluster:
    """Two nodes with a core each."""

    def test_a_run_on_each_core_and_one_whose_worker_is_killed_goes_on(self, folder: Path, ray_address: str) -> None:
        write_corpus(folder)
        file = write()
        long = ["training.max_steps=400", "training.checkpoint_interval=10"]
        process = start(folder, "sweep", str(file), *long, "--ray", ray_address)
        both = [f"rates-00{number}" for number in (0, 1)]
        wait_for(lambda: all((folder / "runs" / name / "metrics.jsonl").exists() for name in both), process)
        run = run_of(both[0])
        assert run is not None
        keeper = run.parent()
        assert keeper is not None and "Keeper" in " ".join(keeper.cmdline())
        keeper.kill()
        done = finish(process)
        assert done.returncode == 0, done.stdout + done.stderr
        rows = re.findall(r"│ rates-00(\d) │ 1 +│ (\S+) +│ ([\d.]+) +│ 400 +│", done.stdout)
        assert sorted(row[0] for row in rows) == ["0", "1"] and float(rows[0][2]) <= float(rows[1][2])
        for number, _, value in rows:
            assert value == f"{metrics(folder / f'runs/rates-00{number}')[-1]['validation_loss']:.4f}"
        starts = (folder / "runs/rates-000/environment.json").read_text().count('"from_step"')
        assert starts == 2 and run_of(both[0]) is None

    def test_more_cores_than_a_node_has(self, folder: Path, ray_address: str) -> None:
        write_corpus(folder)
        done = command(folder, "sweep", str(write()), "--ray", ray_address, "--cores", "2", status=1)
        assert done.stderr.endswith("error: No node of the Ray cluster has --cores 2; the largest has 1.\n")
