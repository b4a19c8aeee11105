"""Does the shipped recipe learn more per minute than nanoGPT? Same tokens, same layers and width, same wall-clock.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python benchmarks/learning.py --nanogpt ../nanoGPT --seeds 3

For every seed it runs, one after the other on the same machine: `scripts/train.py` as a whole process, start-up,
evaluations and checkpoints included; then nanoGPT's own `train.py` for as many iterations as fit into the same seconds,
its start-up and evaluations not counted. nanoGPT has the CPU settings of its README (12 rows of 64 tokens, AdamW at
1e-3); with the first seed it also runs at three times that learning rate, and with our rows. Its schedule ends with its
run. Every final model is then scored by one function on every token of `val.bin`, with
half a window of context or more.
"""

from __future__ import annotations

import importlib.util
import json
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from config.command import Overrides, Recipe, run
from config.load import load_config
from config.schema import Config
from data.tokenization import load_tokenizer
from data.tokens import TokenFiles, load_tokens_manifest
from evaluation.perplexity import Evaluation, default_batch_size, evaluate_tokens
from model.checkpoint import latest_checkpoint, load_model

ROOT = Path(__file__).resolve().parent.parent
CALIBRATION_ITERATIONS = 60


@dataclass(frozen=True)
class Peer:
    """One way to run nanoGPT: its rows, their length, and its learning rate."""

    name: str
    batch_size: int
    block_size: int
    learning_rate: float


@dataclass(frozen=True)
class Result:
    """What one run came to: seconds and steps it took, and its score on the validation tokens."""

    name: str
    seconds: float
    steps: int
    evaluation: Evaluation


class NanoGPT(nn.Module):
    """nanoGPT's model behind the call that our evaluation makes: token ids to the logits of every position."""

    def __init__(self, checkout: Path, checkpoint: Path) -> None:
        super().__init__()
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        source = _import_file("nanogpt_model", checkout / "model.py")
        self.block_size = int(saved["model_args"]["block_size"])
        self.model = source.GPT(source.GPTConfig(**saved["model_args"]))
        self.model.load_state_dict(saved["model"])

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `(batch, time, vocab)`; given targets, nanoGPT's forward makes them for every position."""
        logits: Tensor = self.model(tokens, targets=tokens)[0]
        return logits


def compare(
    nanogpt: Annotated[Path, typer.Option(help="A checkout of nanoGPT.")],
    config: Recipe = ROOT / "config/recipes/demo.yaml",
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(help="How many seeds each contender runs with.")] = 1,
    output: Annotated[Path | None, typer.Option(help="Write the results as JSON too.")] = None,
) -> None:
    """Train the recipe and nanoGPT on the same tokens for the same seconds, and compare their validation losses."""
    settings = load_config([config] if config else [], overrides or [])
    length = settings.training.sequence_length or settings.model.context_length
    peers = [
        Peer("nanoGPT, README CPU settings", 12, 64, 1e-3),
        Peer("nanoGPT, learning rate 3e-3", 12, 64, 3e-3),
        Peer("nanoGPT, our rows, 3e-3", settings.training.batch_size, length, 3e-3),
    ]
    results: list[Result] = []
    for seed in range(1, seeds + 1):
        with tempfile.TemporaryDirectory() as folder:
            ours = run_ours(settings, config, overrides or [], seed, Path(folder) / "ours")
            results.append(ours)
            for number, peer in enumerate(peers if seed == 1 else peers[:1]):
                work = Path(folder) / f"peer{number}"
                results.append(run_nanogpt(nanogpt.resolve(), settings, peer, seed, ours.seconds, work))
    show(results)
    if output:
        rows = [{"name": r.name, "seconds": r.seconds, "steps": r.steps, **r.evaluation.to_dict()} for r in results]
        output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def run_ours(settings: Config, recipe: Path | None, overrides: list[str], seed: int, work: Path) -> Result:
    """Train with `scripts/train.py`; the seconds are those of the whole process."""
    command = [sys.executable, str(ROOT / "scripts/train.py"), *(["--config", str(recipe)] if recipe else [])]
    command += [*overrides, f"training.seed={seed}", "training.run_name=ours", "training.wandb.mode=off"]
    command += [f"training.checkpoint_dir={work / 'checkpoints'}", f"training.runs_dir={work / 'runs'}"]
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - begin
    model, info = load_model(latest_checkpoint(work / "checkpoints"))
    return Result("Quern", seconds, info.step, score(model, model.config.context_length, settings))


def run_nanogpt(checkout: Path, settings: Config, peer: Peer, seed: int, seconds: float, work: Path) -> Result:
    """Train with nanoGPT's `train.py` for as many iterations as fit into `seconds`."""
    work.mkdir(parents=True)
    tokens_dir = Path(settings.data.tokens_dir).resolve()
    vocabulary = load_tokens_manifest(tokens_dir).vocab_size
    for name in ("train.bin", "val.bin"):
        (work / name).symlink_to(tokens_dir / name)
    (work / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocabulary}))
    calibration = _nanogpt_times(checkout, settings, peer, seed, CALIBRATION_ITERATIONS, work)
    iterations = int(1000 * seconds / statistics.median(calibration[10:]))
    times = _nanogpt_times(checkout, settings, peer, seed, iterations, work)
    model = NanoGPT(checkout, work / "out" / "ckpt.pt")
    return Result(peer.name, sum(times) / 1000, iterations, score(model, model.block_size, settings))


def _nanogpt_times(checkout: Path, settings: Config, peer: Peer, seed: int, iterations: int, work: Path) -> list[float]:
    """Milliseconds of every iteration of one run of nanoGPT, as it prints them."""
    source = (checkout / "train.py").read_text(encoding="utf-8").replace("manual_seed(1337", f"manual_seed({seed}")
    program = work / "train.py"
    program.write_text(source, encoding="utf-8")
    flags = {
        "dataset": work,
        "out_dir": work / "out",
        "device": "cpu",
        "compile": False,
        "dtype": "float32",
        "eval_iters": 1,
        "eval_interval": iterations,
        "log_interval": 1,
        "always_save_checkpoint": True,
        "gradient_accumulation_steps": 1,
        "batch_size": peer.batch_size,
        "block_size": peer.block_size,
        "n_layer": settings.model.n_layers,
        "n_head": settings.model.n_heads,
        "n_embd": settings.model.d_model,
        "dropout": 0.0,
        "learning_rate": peer.learning_rate,
        "min_lr": peer.learning_rate / 10,
        "max_iters": iterations,
        "lr_decay_iters": iterations,
        "warmup_iters": min(100, iterations // 10),
        "beta2": 0.99,
    }
    words = [sys.executable, str(program), "config/train_shakespeare_char.py"]
    words += [f"--{name}={value}" for name, value in flags.items()]
    environment = {"PYTHONPATH": str(checkout), "PATH": "/usr/bin:/bin"}
    printed = subprocess.run(words, cwd=checkout, env=environment, check=True, capture_output=True, text=True).stdout
    # Iterations that evaluate are left out: the two of each run time an evaluation and a checkpoint too.
    return [float(found) for found in re.findall(r"^iter [1-9]\d*: .* time ([\d.]+)ms", printed, re.MULTILINE)][:-1]


def score(model: nn.Module, context_length: int, settings: Config) -> Evaluation:
    """Loss and bits per byte over every token of `val.bin`."""
    tokens = TokenFiles(Path(settings.data.tokens_dir), "val")
    tokenizer = load_tokenizer(Path(settings.data.tokenizer_dir))
    return evaluate_tokens(
        model,
        tokens,
        context_length=context_length,
        stride=context_length // 2,
        batch_size=default_batch_size(context_length, tokenizer.vocab_size),
        device="cpu",
        token_bytes=tokenizer.token_bytes(),
    )


def show(results: list[Result]) -> None:
    """Print one line per contender: medians over its seeds, and the spread of the loss."""
    table = Table(title=f"Validation loss after the same seconds ({torch.get_num_threads()} CPU threads)")
    for column in ("run", "seeds", "seconds", "steps", "loss (median)", "spread", "bits per byte"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name in dict.fromkeys(result.name for result in results):
        of_name = [result for result in results if result.name == name]
        losses = [result.evaluation.loss for result in of_name]
        table.add_row(
            name,
            str(len(of_name)),
            f"{statistics.median(result.seconds for result in of_name):.0f}",
            f"{statistics.median(result.steps for result in of_name):.0f}",
            f"{statistics.median(losses):.3f}",
            f"{max(losses) - min(losses):.3f}",
            f"{statistics.median(result.evaluation.bits_per_byte or 0.0 for result in of_name):.3f}",
        )
    Console(width=110).print(table)


def _import_file(name: str, path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, path)
    if specification is None or specification.loader is None:
        raise FileNotFoundError(path)
    module: Any = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module  # type: ignore[no-any-return]


def main() -> None:
    """Run the comparison as a command."""
    run(compare)


if __name__ == "__main__":
    main()
