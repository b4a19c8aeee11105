"""What a run says of its device, and the profile of a few of its steps."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from config.load import load_config
from evaluation.run_report import figures, read_run, write_page
from tests.small_runs import RandomSamples, metrics, train_here
from training.console import Console
from training.gauges import memory_in_use
from training.profiling import RECORDED, SKIPPED, WARM_UP, Profile

ENOUGH = SKIPPED + WARM_UP + RECORDED


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_profile_names_the_dearest_operators_and_draws_the_memory(here: Path) -> None:
    result = train_here(RandomSamples(40, 32), f"training.max_steps={ENOUGH + 2}", profile=True)
    folder = result.run_dir / "profile"
    trace = json.loads((folder / "trace.json").read_text(errors="replace"))
    steps = {event["name"] for event in trace["traceEvents"] if event["name"].startswith("ProfilerStep")}
    assert len(steps) == RECORDED
    heading, *lines = (folder / "operators.txt").read_text().splitlines()
    assert heading.split() == ["operator", "calls", "ms", "a", "step", "share"]
    assert len(lines) == 10 and any("mm" in line.split()[0] for line in lines)
    shares = [float(line.split()[-1].rstrip("%")) for line in lines]
    assert shares == sorted(shares, reverse=True) and 50 < sum(shares) <= 100.1
    assert (folder / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_it_writes_none_and_learns_the_same(here: Path) -> None:
    runs = [
        train_here(RandomSamples(40, 32), f"training.max_steps={ENOUGH}", f"training.run_name={name}", profile=watched)
        for name, watched in (("watched", True), ("alone", False))
    ]
    assert not (runs[1].run_dir / "profile").exists()
    losses = [[row["loss"] for row in metrics(run.run_dir)] for run in runs]
    assert losses[0] == losses[1]


def test_a_run_too_short_to_see_says_so(tmp_path: Path) -> None:
    stream = io.StringIO()
    profile = Profile(tmp_path / "profile", torch.device("cpu"), Console(stream=stream).say)
    profile.step()
    profile.close()
    assert f"needs {ENOUGH} steps" in stream.getvalue()
    assert not any((tmp_path / "profile").iterdir())


def test_arithmetic_and_memory_are_counted_over_all_starts(here: Path) -> None:
    source = RandomSamples(40, 32)
    first = train_here(source, "training.max_steps=6", "training.log_interval=2", "training.checkpoint_interval=4")
    rows = metrics(first.run_dir)
    per_step = rows[0]["flops"] / rows[0]["step"]
    assert per_step > 0
    assert all(row["flops"] == pytest.approx(per_step * row["step"]) for row in rows)
    assert all(50e6 < row["memory_bytes"] < 20e9 for row in rows)
    assert all(row["gpu_temperature"] is None for row in rows)
    longer = train_here(source, "training.max_steps=8", "training.log_interval=2", resume=first.checkpoint)
    assert metrics(longer.run_dir)[-1]["flops"] == pytest.approx(8 * per_step)


def test_memory_of_a_cpu_is_the_process() -> None:
    before = memory_in_use(torch.device("cpu"))
    held = torch.ones(50_000_000)
    assert memory_in_use(torch.device("cpu")) - before > 150e6
    assert held[-1] == 1


def test_the_page_is_made_in_training_and_tells_what_it_cost_and_what_the_recipe_was(here: Path) -> None:
    recipe = load_config([])
    result = train_here(
        RandomSamples(40, 32),
        "training.max_steps=4",
        "training.price_per_device_hour=3600000",
        draw=True,
        recipe=recipe,
        page=write_page,
    )
    page = (result.run_dir / "report.html").read_text(encoding="utf-8")
    assert "What differs from its recipe" in page
    assert "training.max_steps" in page.split("All of it, as YAML")[0]
    found = dict(figures(read_run(result.run_dir)))
    seconds = metrics(result.run_dir)[-1]["seconds"]
    assert float(found["cost so far"].replace(",", "")) == pytest.approx(1000 * seconds, rel=0.01)
    assert float(found["floating-point operations"]) > 0
