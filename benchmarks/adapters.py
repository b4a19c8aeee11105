"""Fine-tuning all weights beside adapters: memory at its peak, state of the optimizer, seconds of a step.

    python -m benchmarks.adapters
    python -m benchmarks.adapters model.variant=modern-350m training.device=cuda --way full --way lora+nf4

Every way takes its turn in every round, in a process of its own: the model is made with random weights, adapted, and
takes a few steps of AdamW on random tokens. Memory on a CPU is what the process took at its peak over what it had taken
before the model was there, so that of the whole weights counts; on a GPU, what PyTorch had allocated there.
"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from config.command import Overrides, Recipe, run
from config.load import load_config, with_vocab_size
from config.schema import Config

WAYS = ("full", "lora", "dora", "lora+int8", "lora+int4", "lora+nf4")
SETTINGS = ["model.variant=gpt2-small", "training.optimizer=adamw", "training.learning_rate=null"]


class Measured(NamedTuple):
    """Weights that are trained, bytes at the peak and of the optimizer's state, seconds of each step but the first."""

    trained: int
    peak: int
    state: int
    seconds: list[float]


def compare(
    config: Recipe = None,
    overrides: Overrides = None,
    ways: Annotated[list[str] | None, typer.Option("--way", help=f"Of {', '.join(WAYS)}; may be repeated.")] = None,
    rows: Annotated[int, typer.Option(help="Sequences of a step.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 256,
    steps: Annotated[int, typer.Option(help="Steps of a turn, of which the first is not timed.")] = 3,
    rounds: Annotated[int, typer.Option(help="Turns of each way.")] = 2,
) -> None:
    """Measure each way of fine-tuning."""
    turns: dict[str, list[Measured]] = {way: [] for way in ways or WAYS}
    for _ in range(rounds):
        for way in turns:
            method, _, quantize = way.partition("+")
            adapter = [] if way == "full" else [f"training.adapter.method={method}"]
            adapter += [f"training.adapter.quantize={quantize}"] if quantize else []
            chosen = load_config([config] if config else [], [*SETTINGS, *(overrides or []), *adapter])
            chosen = with_vocab_size(chosen, chosen.model.vocab_size or 50257)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                turns[way].append(pool.submit(measure, chosen, rows, length, steps).result())
    table = Table("", "trained", "peak memory", "optimizer state", "seconds a step", "of full")
    first = next(iter(turns.values()))
    for way, found in turns.items():
        seconds = [statistics.median(turn.seconds) for turn in found]
        ratio = statistics.median(
            own / statistics.median(other.seconds) for own, other in zip(seconds, first, strict=True)
        )
        peak, state = (max(getattr(turn, name) for turn in found) for name in ("peak", "state"))
        cells = f"{found[0].trained:,}", f"{peak / 1e6:,.0f} MB", f"{state / 1e6:,.1f} MB"
        table.add_row(way, *cells, f"{statistics.median(seconds):.2f}", f"{ratio:.2f}")
    Console().print(table)


def measure(config: Config, rows: int, length: int, steps: int) -> Measured:
    """Take `steps` steps as `config.training` says, on random tokens `(rows, length)`."""
    import resource

    import torch

    from model.devices import choose_device
    from training.adapters import adapt
    from training.optimizers import make_optimizers
    from training.precision import Precision
    from training.setup import new_model

    training, device = config.training, choose_device(config.training.device)
    if training.adapter.method is not None:
        import_module("training.adapted_linear")  # the memory of the program itself is not counted

    def resident() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    precision, before = Precision(training.precision, device), resident()
    model = new_model(config, device)
    if training.adapter.method is not None:
        adapt(model, training.adapter, training.seed)
    optimizers = make_optimizers(model, training)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, config.model.vocab_size or 1, (rows, length + 1), generator=generator).to(device)
    no_skip, seconds = torch.zeros((), dtype=torch.bool, device=device), []
    for _ in range(steps):
        started = time.perf_counter()
        with precision.autocast():
            loss = model(drawn[:, :-1], drawn[:, 1:]) / (rows * length)
        loss.backward()
        optimizers.step(no_skip)
        optimizers.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    tensors = [value for part in optimizers.parts.values() for entry in part.state.values() for value in entry.values()]
    return Measured(
        sum(parameter.numel() for parameter in optimizers.parameters),
        torch.cuda.max_memory_allocated() if device.type == "cuda" else resident() - before,
        sum(value.nbytes for value in tensors),
        seconds[1:],
    )


def main() -> None:
    """Run the benchmark."""
    run(compare)


if __name__ == "__main__":
    main()
