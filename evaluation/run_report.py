"""One self-contained page about a run: its figures, curves, sample texts, configuration and machine.

Everything comes from the files of `runs/<name>/`, so the page can be made at any time, of a run in progress too.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from config.errors import UserError
from config.files import write_text
from config.load import load_config
from config.pages import render
from evaluation.before_after import BEFORE_AFTER, summary

REPORT = "report.html"
_MOST_SAMPLES = 6


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What a run has written about itself; parts that are not there yet are empty."""

    directory: Path
    config: dict[str, Any]
    recipe: dict[str, Any] | None
    """The configuration before the command line changed single settings; None for runs that have not kept it."""
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    evaluation: dict[str, Any]
    tasks: dict[str, Any]
    answers: dict[str, Any]
    environment: list[dict[str, Any]]

    @property
    def curves(self) -> Path:
        """The picture of the losses."""
        return self.directory / "curves.png"

    def last(self, key: str) -> Any:
        """The last value of `key` among the metrics, None where there is none."""
        return next((row[key] for row in reversed(self.metrics) if row.get(key) is not None), None)


def read_run(directory: Path) -> RunFiles:
    """Read the files of `directory`. Raises `UserError` where that is no run."""
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory} is not the folder of a run. Runs are made by python scripts/train.py.")
    return RunFiles(
        directory=directory,
        config=yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8")),
        recipe=_yaml(directory / "recipe.yaml"),
        metrics=_json_lines(directory / "metrics.jsonl"),
        samples=_json_lines(directory / "samples.jsonl"),
        evaluation=_json(directory / "evaluation.json", {}),
        tasks=_json(directory / "tasks.json", {}),
        answers=_json(directory / BEFORE_AFTER, {}),
        environment=_json(directory / "environment.json", []),
    )


def newest_run(runs_dir: Path) -> Path:
    """The run in `runs_dir` that was written to last. Raises `UserError` where there is none."""
    runs = [path.parent for path in runs_dir.glob("*/metrics.jsonl")]
    if not runs:
        raise UserError(f"There is no run in {runs_dir}. Train one: python scripts/train.py")
    return max(runs, key=lambda run: (run / "metrics.jsonl").stat().st_mtime)


def figures(run: RunFiles) -> list[tuple[str, str]]:
    """The figures at the top of the page, as (label, value)."""
    found = run.evaluation
    loss = found.get("loss", run.last("validation_loss"))
    preferring = run.last("reward_margin") is not None
    pairs = [
        (f"held-out loss{' of DPO, nats per pair' if preferring else ', nats per token'}", _number(loss, ".3f")),
        ("reward accuracy, of held-out pairs", _number(run.last("reward_accuracy"), ".1%")),
        ("reward margin, of held-out pairs", _number(run.last("reward_margin"), ".3f")),
        ("perplexity", _number(found.get("perplexity"), ",.1f")),
        ("bits per byte", _number(found.get("bits_per_byte"), ".3f")),
        ("steps", _number(run.last("step"), ",")),
        ("tokens trained on", _number(run.last("tokens"), ",")),
        ("seconds of training", _number(run.last("seconds"), ",.0f")),
        *_cost(run),
    ]
    return [(label, value) for label, value in pairs if value]


def write_page(directory: Path) -> None:
    """The page of the run in `directory`, from what it has written so far."""
    write_report(read_run(directory))


def write_report(run: RunFiles) -> Path:
    """Write `report.html` into the run's folder, and return its path."""
    model = run.config["model"]
    page = render(
        Path(__file__).parent / "templates" / "run.html",
        name=run.directory.name,
        about=f"{model['variant']}: {model['n_layers']} layers, width {model['d_model']}, "
        f"context {model['context_length']}, vocabulary {model['vocab_size']}",
        figures=figures(run),
        curves=base64.b64encode(run.curves.read_bytes()).decode() if run.curves.is_file() else None,
        tasks=[
            (name, metric, found["value"], found["interval"], one["documents"] or None, one["step"])
            for name, one in run.tasks.items()
            for metric, found in one["metrics"].items()
        ],
        answers={**run.answers, "summary": summary(run.answers["cases"])} if run.answers else None,
        samples=_spread(run.samples, _MOST_SAMPLES),
        changes=_changes(run.config, run.recipe or load_config().model_dump()),
        changed_from="its recipe" if run.recipe else "the defaults that ship",
        configuration=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        environment=list(run.environment[-1].items()) if run.environment else [],
    )
    path = run.directory / REPORT
    write_text(path, page)
    return path


def _cost(run: RunFiles) -> list[tuple[str, str]]:
    """What the run has taken so far: arithmetic, memory, device-hours, and money where a price is given."""
    seconds, flops, memory = (run.last(key) for key in ("seconds", "flops", "memory_bytes"))
    price = run.config["training"].get("price_per_device_hour")
    hours = _device_hours(run)
    return [
        ("floating-point operations", _number(flops, ".3g")),
        ("device-hours", _number(hours if seconds else None, ",.2f")),
        ("cost so far", _number(hours * price if price and seconds else None, ",.2f")),
        ("memory of a device, GB", "" if memory is None else f"{memory / 1e9:,.1f}"),
    ]


def _device_hours(run: RunFiles) -> float:
    """Of every process: a run may have gone on with another number of them than it had begun with."""
    hours = before = 0.0
    for row in run.metrics:
        seconds = row.get("seconds") or before
        starts = (start["processes"] for start in reversed(run.environment) if start["from_step"] < row["step"])
        hours += (seconds - before) * next(starts, 1) / 3600
        before = seconds
    return hours


def _changes(config: Any, default: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Keys whose values differ from the defaults, as (dotted key, default, value)."""
    if not isinstance(config, dict) or not isinstance(default, dict):
        return [] if config == default else [(prefix, default, config)]
    found: list[tuple[str, Any, Any]] = []
    for key in config:
        found += _changes(config[key], default.get(key), f"{prefix}.{key}" if prefix else key)
    return found


def _spread(items: list[Any], most: int) -> list[Any]:
    """At most `most` of `items`, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def _json(path: Path, missing: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else missing


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may be growing: a last one without its newline is not read."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines if line]
