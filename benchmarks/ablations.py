"""Which means pay? One recipe, each of its means switched on or off by itself, several seeds, a fixed number of steps.

    python -m benchmarks.ablations --config config/recipes/shakespeare.yaml --seeds 3 --target 1.78
    python -m benchmarks.ablations --config config/recipes/shakespeare.yaml --only "AdamW alone"
    python -m benchmarks.ablations --config config/recipes/shakespeare.yaml --try "300 steps: training.max_steps=300"

The recipe's tokens must lie there (data/download_datasets.py, data/tokenizer.py, data/preprocess.py with the same
recipe). The runs of a seed follow one another, in this process, so they share whatever else the machine does. Seconds
are those of the processor (all threads together), which a busy machine hardly changes; evaluations are not counted, nor
what is done before the first step and after the last. The loss is that of `training.eval_tokens` validation tokens, and
the seconds to the target end with the first evaluation at or below it: `training.eval_interval` is their resolution.
"""

from __future__ import annotations

import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from config.command import Overrides, Recipe, run
from config.errors import UserError
from config.load import load_config

if TYPE_CHECKING:
    from config.schema import Config
    from data.data_loader import Sample, SampleSource
    from evaluation.perplexity import Evaluation
    from model.transformer import Transformer

MEANS: dict[str, list[str]] = {
    "AdamW alone": ["training.optimizer=adamw"],
    "Newton-Schulz, 5 steps": ["training.muon.orthogonalisation=newton_schulz", "training.muon.steps=5"],
    "Newton-Schulz, 3 steps": ["training.muon.orthogonalisation=newton_schulz", "training.muon.steps=3"],
    "Polar Express, 5 steps": ["training.muon.orthogonalisation=polar_express", "training.muon.steps=5"],
    "Polar Express, 3 steps": ["training.muon.orthogonalisation=polar_express", "training.muon.steps=3"],
    "Polar Express, 2 steps": ["training.muon.orthogonalisation=polar_express", "training.muon.steps=2"],
    "NorMuon": ["training.muon.second_moment=0.95"],
    "no NorMuon": ["training.muon.second_moment=null"],
    "decay 0.1": ["training.muon.weight_decay=0.1"],
    "cautious decay 0.1": ["training.muon.weight_decay=0.1", "training.cautious_weight_decay=true"],
    "learned positions": ["model.position=learned"],
    "no QK-norm": ["model.qk_norm=false"],
    "projections not zero": ["model.zero_init_projections=false"],
    "GELU": ["model.activation=gelu"],
    "SwiGLU": ["model.activation=swiglu"],
    "tied head": ["model.tie_embeddings=true"],
    "soft-cap 30": ["model.logit_soft_cap=30"],
    "value embeddings": ["model.value_embeddings=alternate"],
    "no value embeddings": ["model.value_embeddings=none"],
    "residual scaling": ["model.residual_scaling=true"],
    "no residual scaling": ["model.residual_scaling=false"],
    "cosine": ["training.schedule.name=cosine"],
    "whole sequences": ["training.short_sequences.length=null"],
    "float32": ["training.precision=fp32"],
}


@dataclass(frozen=True)
class Trained:
    """One run: its last loss, its processor seconds, and (seconds, loss) of every evaluation."""

    name: str
    seed: int
    loss: float
    seconds: float
    curve: list[tuple[float, float]]

    def seconds_to(self, target: float) -> float | None:
        """Processor seconds up to the first evaluation at or below `target`; None where none came so far."""
        return next((seconds for seconds, loss in self.curve if loss <= target), None)


class Stopwatch:
    """The training samples and the evaluation of a run, with a clock that runs from the first sample on, and stands
    still while the run is evaluated."""

    def __init__(self, source: SampleSource, evaluation: Callable[[Transformer, int, int], Evaluation]) -> None:
        self.source, self.evaluation = source, evaluation
        self.curve: list[tuple[float, float]] = []
        self.seconds = 0.0
        self.since: float | None = None

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, index: int) -> Sample:
        """One sample of the source."""
        if self.since is None:
            self.since = time.process_time()
        return self.source.sample(index)

    def evaluate(self, model: Transformer, rank: int, world_size: int) -> Evaluation:
        """The evaluation, noted."""
        assert self.since is not None
        self.seconds += time.process_time() - self.since
        evaluation = self.evaluation(model, rank, world_size)
        self.curve.append((self.seconds, evaluation.loss))
        self.since = time.process_time()
        return evaluation


def ablate(
    config: Recipe = None,
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(help="How many seeds every variant runs with.")] = 1,
    target: Annotated[float | None, typer.Option(help="Report the seconds to this validation loss.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this means; may be given again.")] = None,
    also: Annotated[
        list[str] | None, typer.Option("--try", help='A means of your own, "name: key=value key=value".')
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write every run as JSON too.")] = None,
) -> None:
    """Train a recipe, and the recipe with each means switched, and compare losses and processor seconds."""
    from model.waiting import watch_cores

    watch_cores()
    variants = choose(config, overrides or [], only, also)
    trained: list[Trained] = []
    for seed in range(1, seeds + 1):
        for name, settings in variants.items():
            trained.append(measure(name, settings, seed))
            print(f"seed {seed}  {name}: loss {trained[-1].loss:.4f}, {trained[-1].seconds:.1f} s", flush=True)
            if output:
                output.write_text(json.dumps([asdict(one) for one in trained], indent=1) + "\n", encoding="utf-8")
    show(trained, target)


def choose(
    recipe: Path | None, overrides: list[str], only: list[str] | None, also: list[str] | None
) -> dict[str, Config]:
    """The recipe itself, and every means by name that makes a difference to it, as whole configurations."""
    own = [text.partition(":") for text in also or []]
    wrong = [name for name in only or [] if name not in MEANS]
    if wrong:
        raise UserError(f"There is no means {wrong[0]!r}; choose from: {', '.join(MEANS)}.")
    chosen = {name: MEANS[name] for name in only or ([] if own else MEANS)}
    chosen |= {name.strip(): rest.split() for name, _, rest in own}
    recipes = [recipe] if recipe else []
    variants = {"the recipe": load_config(recipes, overrides)}
    for name, settings in chosen.items():
        config = load_config(recipes, [*overrides, *settings])
        if config not in variants.values():
            variants[name] = config
    return variants


def measure(name: str, config: Config, seed: int) -> Trained:
    """Train once, leaving nothing behind."""
    from scripts.train import evaluator
    from training.pretraining import open_pretraining
    from training.trainer import train

    with tempfile.TemporaryDirectory() as folder:
        changes = {
            "seed": seed,
            "run_name": "ablation",
            "runs_dir": f"{folder}/runs",
            "checkpoint_dir": f"{folder}/checkpoints",
            "checkpoint_interval": 10**9,
            "sample_interval": 0,
            "wandb": config.training.wandb.model_copy(update={"mode": "off"}),
        }
        training = config.training.model_copy(update=changes)
        job = open_pretraining(config.model_copy(update={"training": training}), None)
        watch = Stopwatch(job.source, evaluator(job))
        fingerprint = job.tokenizer_fingerprint
        with redirect_stdout(io.StringIO()):
            result = train(job.config, watch, tokenizer_fingerprint=fingerprint, evaluate=watch.evaluate)
    if result.stopped_by is not None:
        raise typer.Exit(128 + result.stopped_by)
    return Trained(name, seed, watch.curve[-1][1], watch.seconds, watch.curve)


def show(trained: list[Trained], target: float | None) -> None:
    """Print one line per variant: medians over its seeds, the spread of the loss, and what it is beside the first."""
    losses = {
        name: [run.loss for run in trained if run.name == name] for name in dict.fromkeys(r.name for r in trained)
    }
    first = statistics.median(next(iter(losses.values())))
    columns = ["variant", "seeds", "loss (median)", "spread", "difference", "CPU seconds"]
    table = Table(*columns, *([f"to {target}"] if target else []), title="Each means by itself")
    for name, values in losses.items():
        of_name = [run for run in trained if run.name == name]
        row = [
            name,
            str(len(values)),
            f"{statistics.median(values):.4f}",
            f"{max(values) - min(values):.4f}",
            f"{statistics.median(values) - first:+.4f}",
            f"{statistics.median(run.seconds for run in of_name):.1f}",
        ]
        if target:
            reached = [run.seconds_to(target) for run in of_name]
            known = [seconds for seconds in reached if seconds is not None]
            row.append(f"{statistics.median(known):.1f}" if len(known) == len(reached) else "not reached")
        table.add_row(*row)
    Console(width=110).print(table)


def main() -> None:
    """Run the ablations as a command."""
    run(ablate)


if __name__ == "__main__":
    main()
