"""The page about a run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from config.errors import UserError
from config.load import load_config, save_config
from evaluation.run_report import figures, newest_run, read_run, write_report


def make_run(directory: Path, *overrides: str) -> Path:
    save_config(load_config([], list(overrides)), directory / "config.yaml")
    rows = [
        {"step": step, "tokens": 1024 * step, "loss": 5.0 - step / 10, "seconds": float(step), "validation_loss": None}
        for step in range(1, 11)
    ]
    rows[-1]["validation_loss"] = 4.25
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 11, "lo')
    return directory


class Text(HTMLParser):
    """The text of a page, and the tags and addresses in it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_figures_come_from_the_metrics_until_there_is_an_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    assert dict(figures(read_run(run)))["held-out loss, nats per token"] == "4.250"
    (run / "evaluation.json").write_text(json.dumps({"loss": 4.2, "perplexity": 66.7, "bits_per_byte": 1.9}))
    found = dict(figures(read_run(run)))
    assert found["held-out loss, nats per token"] == "4.200"
    assert (found["perplexity"], found["bits per byte"]) == ("66.7", "1.900")
    assert (found["steps"], found["tokens trained on"]) == ("10", "10,240")


def test_device_hours_count_the_processes_of_every_start(tmp_path: Path) -> None:
    """Two processes, four that begin again at step 4 and are stopped, and one from step 8 on."""
    run = make_run(tmp_path / "elastic", "training.price_per_device_hour=36")
    starts = [(0, 2), (4, 3), (4, 4), (8, 1)]
    (run / "environment.json").write_text(json.dumps([{"from_step": at, "processes": n} for at, n in starts]))
    found = dict(figures(read_run(run)))
    assert found["cost so far"] == "0.26", "4 seconds of 2, 4 of 4 and 2 of 1, at a hundredth each"
    (run / "environment.json").write_text(json.dumps([{"from_step": 0, "processes": 3600}]))
    assert dict(figures(read_run(run)))["device-hours"] == "10.00"


def test_page_is_one_file_that_never_runs_what_a_model_wrote(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first", "model.n_layers=3")
    (run / "samples.jsonl").write_text(json.dumps({"step": 10, "text": "<script>alert(1)</script> & more"}) + "\n")
    (run / "curves.png").write_bytes(b"\x89PNG")
    page = Text(write_report(read_run(run)).read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert "<script>alert(1)</script> & more" in "".join(page.words)
    assert page.addresses and all(address.startswith("data:") for address in page.addresses)
    words = " ".join(" ".join(page.words).split())
    assert re.search(r"model\.n_layers \d+ 3\b", words)
    assert "training.max_steps" not in words.split("All of it, as YAML")[0]


def test_samples_are_thinned_but_keep_the_first_and_the_last(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    lines = [json.dumps({"step": step, "text": f"sample of step {step}."}) for step in range(100)]
    (run / "samples.jsonl").write_text("\n".join(lines) + "\n")
    words = "".join(Text(write_report(read_run(run)).read_text(encoding="utf-8")).words)
    shown = [int(number) for number in re.findall(r"sample of step (\d+)\.", words)]
    assert shown[0] == 0 and shown[-1] == 99 and len(shown) == 6


def test_newest_run_is_the_one_written_last(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scripts/train.py"):
        newest_run(tmp_path)
    make_run(tmp_path / "b")
    make_run(tmp_path / "a")
    assert newest_run(tmp_path).name == "a"
    with pytest.raises(UserError, match="not the folder of a run"):
        read_run(tmp_path)


def test_the_page_shows_what_was_reached_in_tasks(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    metrics = {"acc": {"value": 0.4375, "interval": [0.25, 0.625]}, "other": {"value": 2.5, "interval": None}}
    (run / "tasks.json").write_text(json.dumps({"some_task": {"metrics": metrics, "documents": 32, "step": 1000}}))
    words = " ".join(" ".join(Text(write_report(read_run(run)).read_text(encoding="utf-8")).words).split())
    assert "some_task acc 0.4375 0.2500 to 0.6250 32 1,000" in words and "other 2.5000 32 1,000" in words
