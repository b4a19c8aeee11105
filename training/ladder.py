"""A ladder of runs, sizes by budgets of tokens, from which the law of loss is fitted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import yaml

from config.errors import UserError
from config.files import write_text
from config.load import config_from_dict, load_config, with_vocab_size
from config.schema import Config
from model.transformer import Transformer
from training.experiment import PlannedRun, read_experiment, settings_of
from training.forecast import amount
from training.plan import sequence_length
from training.power_law import Fit, Parabola, Point, optimal_exponent


@dataclass(frozen=True, slots=True)
class Ladder:
    """The runs that are fitted, and the one that is predicted, if any."""

    name: str
    runs: Sequence[PlannedRun]
    predicted: PlannedRun | None

    @property
    def directory(self) -> Path:
        """Where the result goes."""
        return self.runs[0].runs_dir / self.name


def read_ladder(path: Path, overrides: Sequence[str] = (), recipe: Path | None = None) -> Ladder:
    """The ladder that the YAML `path` describes; `overrides` go into every run, and `recipe` takes the
    place of its base.

    Raises `UserError` for an unknown key, settings that make no configuration, budgets under one step, and runs that
    were made with other settings under the same names.
    """
    tree = read_experiment(path, ["name", "sizes", "tokens"], ["base", "settings", "predict"])
    sizes, base = tree["sizes"], recipe or (Path(tree["base"]) if tree.get("base") else None)
    if not isinstance(sizes, Mapping):
        raise UserError(f"{path}: sizes must hold a name and its settings for each size, not {sizes!r}.")
    if not isinstance(tree["tokens"], list):
        raise UserError(f"{path}: tokens must be a list of budgets, such as [1M, 4M], not {tree['tokens']!r}.")
    predict = tree.get("predict")
    if predict is not None and (not isinstance(predict, Mapping) or set(predict) != {"size", "tokens"}):
        raise UserError(f"{path}: predict must hold the keys size and tokens, not {predict!r}.")
    common = [*settings_of(path, "settings", tree.get("settings") or {}), *overrides]

    def planned(name: str, where: str, size: Any, budget: Any) -> PlannedRun:
        settings = [*common, *settings_of(path, where, size)]
        return _planned(path, f"{tree['name']}-{name}", base, settings, budget)

    runs = [
        planned(f"{name}-{budget}", f"sizes.{name}", size, budget)
        for name, size in sizes.items()
        for budget in tree["tokens"]
    ]
    predicted = planned("predicted", "predict.size", predict["size"], predict["tokens"]) if predict else None
    for run in [*runs, *([predicted] if predicted else [])]:
        run.require_same()
    return Ladder(str(tree["name"]), runs, predicted)


def _planned(path: Path, name: str, base: Path | None, settings: Sequence[str], budget: Any) -> PlannedRun:
    tokens = amount("tokens", str(budget))
    config = load_config([base] if base else [], settings)
    per_step = config.training.batch_size * sequence_length(config.model, config.training)
    steps = round(tokens / per_step)
    if steps < 1:
        raise UserError(f"{path}: a budget of {budget} tokens is less than one step of {per_step:,}.")
    return PlannedRun(name, base, [*settings, f"training.max_steps={steps}"], Path(config.training.runs_dir))


def parameters_of(config: Config) -> int:
    """All weights of its model, embeddings among them, as in Hoffmann et al."""
    with torch.device("meta"):
        return Transformer(config.model).num_parameters()


def size_and_tokens(ladder: Ladder) -> tuple[int, int]:
    """Of the run that is to be predicted; its vocabulary is that of the runs that were made."""
    assert ladder.predicted is not None
    path = ladder.runs[0].directory / "config.yaml"
    vocab_size = config_from_dict(yaml.safe_load(path.read_text(encoding="utf-8")), str(path)).model.vocab_size
    config = with_vocab_size(ladder.predicted.config, vocab_size or 0)
    training = config.training
    tokens = (training.max_steps or 0) * training.batch_size * sequence_length(config.model, training)
    return parameters_of(config), tokens


def measured(run: PlannedRun) -> Point:
    """What a finished run has come to."""
    result = run.result
    assert result is not None
    path = run.directory / "config.yaml"
    config = config_from_dict(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    last = run.rows[-1]
    return Point(parameters_of(config), last["tokens"], last["flops"], result["validation_loss"])


def train_all(runs: Sequence[PlannedRun], say: Callable[[str], None]) -> None:
    """Train those of `runs` that are not finished, one after the other; `UserError` where one fails."""
    for number, run in enumerate(runs, start=1):
        if run.result is not None:
            continue
        say(f"{number}/{len(runs)}  {run.name}: {run.config.training.max_steps:,} steps")
        process = run.start()
        try:
            process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if process.returncode or run.result is None:
            raise run.failure()


def write_results(ladder: Ladder, points: Mapping[str, Point], fit: Fit, parabolas: Sequence[Parabola]) -> None:
    """`scaling.json` in the ladder's folder: the runs, the law with its intervals, the parabolas."""
    intervals = {key: fit.interval(attrgetter(key)) for key in (*asdict(fit.law), "optimal_exponent")}
    whole = {
        "runs": {name: point._asdict() for name, point in points.items()},
        "law": asdict(fit.law),
        "optimal_exponent": fit.law.optimal_exponent,
        "intervals": intervals,
        "relative_error": fit.error,
        "parabolas": [parabola._asdict() for parabola in parabolas],
        "optimal_exponent_of_parabolas": optimal_exponent(parabolas),
    }
    write_text(ladder.directory / "scaling.json", json.dumps(whole, indent=2) + "\n")
