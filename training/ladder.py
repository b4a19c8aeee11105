"""A ladder of runs, sizes by budgets of tokens, from which the law of loss is fitted."""

from __future__ import annotations

import json
import math
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
from training.estimate import Sizes
from training.experiment import PlannedRun, read_experiment, settings_of
from training.forecast import amount
from training.isoflop import IsoFlop
from training.plan import sequence_length
from training.power_law import Fit, Point


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
    tree = read_experiment(path, ["name", "sizes"], ["tokens", "flops", "base", "settings", "predict"])
    sizes, base = tree["sizes"], recipe or (Path(tree["base"]) if tree.get("base") else None)
    if not isinstance(sizes, Mapping):
        raise UserError(f"{path}: sizes must hold a name and its settings for each size, not {sizes!r}.")
    budgets = {key: tree[key] for key in ("tokens", "flops") if tree.get(key) not in (None, [])}
    if not budgets:
        raise UserError(f"{path}: the key 'tokens' is missing or empty; give it, or flops, or both.")
    for key, example in (("tokens", "[1M, 4M]"), ("flops", "[1e13, 4e13]")):
        if not isinstance(budgets.get(key, []), list):
            raise UserError(f"{path}: {key} must be a list of budgets, such as {example}, not {tree[key]!r}.")
    predict = tree.get("predict")
    if predict is not None and (not isinstance(predict, Mapping) or set(predict) != {"size", "tokens"}):
        raise UserError(f"{path}: predict must hold the keys size and tokens, not {predict!r}.")
    common = [*settings_of(path, "settings", tree.get("settings") or {}), *overrides]

    def planned(name: str, where: str, size: Any, budget: Any, kind: str = "tokens") -> PlannedRun:
        settings = [*common, *settings_of(path, where, size)]
        return _planned(path, f"{tree['name']}-{name}", base, settings, budget, kind)

    runs = [
        planned(f"{name}-{budget if kind == 'tokens' else _brief(budget)}", f"sizes.{name}", size, budget, kind)
        for name, size in sizes.items()
        for kind, wanted in budgets.items()
        for budget in wanted
    ]
    predicted = planned("predicted", "predict.size", predict["size"], predict["tokens"]) if predict else None
    for run in [*runs, *([predicted] if predicted else [])]:
        run.require_same()
    return Ladder(str(tree["name"]), runs, predicted)


def _brief(flops: Any) -> str:
    return f"{amount('flops', str(flops).replace('+', '')):g}flops".replace("+", "").replace("e0", "e")


def _planned(path: Path, name: str, base: Path | None, settings: Sequence[str], budget: Any, kind: str) -> PlannedRun:
    """A run of so many tokens, or of as many as the `kind` flops makes of the budget; rounded to whole steps."""
    tokens = amount(kind, str(budget).replace("+", ""))
    config = load_config([base] if base else [], settings)
    if kind == "flops":
        tokens /= Sizes(config).flops_per_token
    per_step = config.training.batch_size * sequence_length(config.model, config.training)
    steps = round(tokens / per_step)
    if steps < 1:
        raise UserError(f"{path}: a budget of {budget} {kind} is less than one step of {per_step:,} tokens.")
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
    if result["validation_loss"] is None or not math.isfinite(result["validation_loss"]):
        raise UserError(f"{run.name} diverged: its loss is not a number, so no law goes through it. Lower its rates.")
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


def write_results(ladder: Ladder, points: Mapping[str, Point], fit: Fit, isoflop: IsoFlop) -> None:
    """`scaling.json` in the ladder's folder: the runs, the law, the parabolas, and the prediction, with intervals."""
    intervals = {key: fit.interval(attrgetter(key)) for key in (*asdict(fit.law), "optimal_exponent")}
    whole: dict[str, Any] = {
        "runs": {name: point._asdict() for name, point in points.items()},
        "law": asdict(fit.law),
        "optimal_exponent": fit.law.optimal_exponent,
        "intervals": intervals,
        "relative_error": fit.error,
        "parabolas": [parabola._asdict() for parabola in isoflop.parabolas],
        "optimal_exponent_of_parabolas": isoflop.exponent,
        "optimal_exponent_of_parabolas_interval": isoflop.exponent_interval,
    }
    if ladder.predicted is not None:
        parameters, tokens = size_and_tokens(ladder)
        whole["prediction"] = {
            "parameters": parameters,
            "tokens": tokens,
            "loss": fit.law.loss(parameters, tokens),
            "interval": fit.prediction(parameters, tokens),
        }
    write_text(ladder.directory / "scaling.json", json.dumps(whole, indent=2) + "\n")
