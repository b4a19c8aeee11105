"""What Weights & Biases is handed: the names of metrics.jsonl, under one id for as long as a run goes on."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.small_runs import RandomSamples, metrics, train_here


class Service:
    """The package `wandb` as far as runs use it, which keeps what it is handed."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.log: Callable[[dict[str, Any]], None] = self.rows.append
        self.finished = 0

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **options: Any) -> Any:
        self.begun.append(options)
        return SimpleNamespace(define_metric=lambda *names, **more: None, log=self.log, finish=self._finish)

    def _finish(self) -> None:
        self.finished += 1


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server that answers, someone who has logged in, and the package."""
    monkeypatch.chdir(tmp_path)
    package = Service()
    monkeypatch.setitem(sys.modules, "wandb", package)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield package


def test_a_resumed_run_goes_on_under_its_id_with_the_names_of_the_metrics(service: Service) -> None:
    settings = ["training.wandb.mode=auto", "training.wandb.project=mill", "training.run_name=one"]
    settings += ["training.log_interval=2", "training.checkpoint_interval=4"]
    first = train_here(RandomSamples(32, 32), *settings, "training.max_steps=4")
    train_here(RandomSamples(32, 32), *settings, "training.max_steps=8", resume=first.checkpoint)
    begun, again = service.begun
    assert begun["id"] == again["id"] and len(begun["id"]) == 8
    assert (begun["project"], begun["name"], begun["mode"], again["resume"]) == ("mill", "one", "online", "allow")
    assert again["config"]["training"]["max_steps"] == 8
    rows = metrics(Path("runs/one"))
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    told = [{key: value for key, value in row.items() if value is not None} for row in rows]
    assert json.loads(json.dumps(service.rows)) == told
    assert service.finished == 2


def test_a_failing_service_is_one_warning(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(row: dict[str, Any]) -> None:
        raise ConnectionError("the line is cut")

    service.log = fail
    result = train_here(RandomSamples(32, 32), "training.wandb.mode=online", "training.log_interval=1")
    assert result.checkpoint is not None and len(metrics(result.run_dir)) == 8
    assert capsys.readouterr().err.count("Weights & Biases failed and is left out: the line is cut") == 1
