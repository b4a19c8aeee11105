"""What a step of Muon takes: ours beside `torch.optim.Muon`, on the matrices of a model's blocks.

    OMP_NUM_THREADS=1 python -m benchmarks.muon_step
    OMP_NUM_THREADS=1 python -m benchmarks.muon_step model.variant=gpt2-small --rounds 5

On a CPU, in seconds of the processor. The optimizers take their steps in turns, and the median of each is printed.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from config.command import Overrides, Recipe, run
from config.load import load_config, with_vocab_size


def compare(
    config: Recipe = None,
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(help="Steps of each optimizer.")] = 25,
) -> None:
    """Time a step of Muon on the matrices of the configured model."""
    from model.waiting import watch_cores
    from training.environment import keep_freed_memory

    watch_cores()
    import torch

    from model.transformer import Transformer
    from training.muon import Muon
    from training.optimizers import sort_parameters

    keep_freed_memory()
    settings = with_vocab_size(load_config([config] if config else [], overrides or []), 256)

    def matrices() -> list[torch.nn.Parameter]:
        chosen = sort_parameters(Transformer(settings.model), with_muon=True)["muon"]
        for parameter in chosen:
            parameter.grad = torch.randn_like(parameter)
        return chosen

    express = {"orthogonalisation": "polar_express", "steps": 3}
    optimizers: dict[str, torch.optim.Optimizer] = {
        "torch.optim.Muon": torch.optim.Muon(matrices(), lr=0.01),
        "Newton-Schulz, 5 steps": Muon(matrices(), lr=0.01),
        "Polar Express, 3 steps": Muon(matrices(), lr=0.01, **express),  # type: ignore[arg-type]
        "the same, NorMuon": Muon(matrices(), lr=0.01, second_moment=0.95, **express),  # type: ignore[arg-type]
    }
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(rounds + 2):
        for name, optimizer in optimizers.items():
            begin = time.process_time()
            optimizer.step()
            seconds[name].append(time.process_time() - begin)
    count = sum(parameter.numel() for parameter in optimizers["torch.optim.Muon"].param_groups[0]["params"])
    table = Table("step of", "ms", "ns per parameter", title=f"{count:,} parameters, {torch.get_num_threads()} threads")
    for name, times in seconds.items():
        median = statistics.median(times[2:])
        table.add_row(name, f"{1e3 * median:.1f}", f"{1e9 * median / count:.1f}")
    Console(width=100).print(table)


def main() -> None:
    """Run the comparison as a command."""
    run(compare)


if __name__ == "__main__":
    main()
