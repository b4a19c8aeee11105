"""What a checkpoint in the background costs the training: steps with a save and without, in turns.

    python -m benchmarks.saving
    python -m benchmarks.saving model.variant=modern-350m training.device=cuda --rows 8 --length 1024

The model has random weights and takes steps of its optimizer on random tokens, as the training loop does. In every
round one step is taken with nothing else going on, one over whose forward and backward pass the state is copied, and
then as many as the writing takes. On a GPU a step ends when the device is done with it. The seconds of the processor,
of all threads of this process, tell the work of a save apart from whatever else the machine is doing.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from config.command import Overrides, Recipe, run
from config.load import load_config, with_vocab_size
from config.schema import Config

SETTINGS = ["model.variant=gpt2-small", "training.optimizer=adamw", "training.learning_rate=null"]
WARM_UP = 3  # steps
KINDS = ("nothing else going on", "the state copied beside it", "the file written beside it")


def measure(
    config: Recipe = None,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="Sequences of a step.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 256,
    rounds: Annotated[int, typer.Option(help="Checkpoints.")] = 9,
    folder: Annotated[Path, typer.Option(help="Where a folder for the checkpoints is made.")] = Path("."),
) -> None:
    """Measure steps with a save and without."""
    from model.waiting import watch_cores

    watch_cores()
    with TemporaryDirectory(dir=folder) as checkpoints:
        own = [f"training.checkpoint_dir={checkpoints}", "training.keep_last=1", "training.save_in_background=true"]
        chosen = load_config([config] if config else [], [*SETTINGS, *(overrides or []), *own])
        chosen = with_vocab_size(chosen, chosen.model.vocab_size or 50257)
        show(*take_steps(chosen, rows, length, rounds))


class Step(NamedTuple):
    """What a step took: seconds, and seconds of the processor."""

    wall: float
    processor: float


Rounds = list[list[list[Step]]]
"""The steps by round and by `KINDS`."""


def take_steps(config: Config, rows: int, length: int, rounds: int) -> tuple[str, Rounds, list[float]]:
    """What is trained on what, the steps, and the seconds until the files were whole."""
    import torch

    from model.checkpoint_folder import checkpoint_path
    from model.devices import choose_device
    from training.checkpointing import Checkpoints
    from training.environment import keep_freed_memory
    from training.optimizers import make_optimizers
    from training.precision import Precision
    from training.setup import new_model
    from training.staging import staged_bytes

    keep_freed_memory()
    training, device = config.training, choose_device(config.training.device)
    precision, model = Precision(training.precision, device), new_model(config, device)
    optimizers = make_optimizers(model, training)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, config.model.vocab_size or 1, (rows, length + 1), generator=generator).to(device)
    no_skip = torch.zeros((), dtype=torch.bool, device=device)
    checkpoints = Checkpoints(training, "saving", print)

    def state(number: int) -> dict[str, object]:
        saved = {"model": model.state_dict(), "optimizer": optimizers.state_dict()}
        return {**saved, "config": config.model_dump(), "step": number, "validation_loss": None}

    def step(saved: int | None = None) -> Step:
        started, processor = time.perf_counter(), time.process_time()
        if saved is not None:
            checkpoints.save(state(saved), final=False)
        with precision.autocast():
            loss = model(drawn[:, :-1], drawn[:, 1:]) / (rows * length)
        loss.backward()
        checkpoints.settle()
        optimizers.step(no_skip)
        optimizers.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return Step(time.perf_counter() - started, time.process_time() - processor)

    for _ in range(WARM_UP):
        step()
    checkpoints.tend(lambda: state(0))
    taken: Rounds = []
    until_whole = []
    for number in range(rounds + 1):
        alone, copying, writing = [step()], [], []
        started = time.perf_counter()
        copying.append(step(number))
        while checkpoints.latest != checkpoint_path(checkpoints.directory, number):
            writing.append(step())
            checkpoints.hear()
        until_whole.append(time.perf_counter() - started)
        taken.append([alone, copying, writing])
    nbytes = staged_bytes(state(0))
    checkpoints.close()
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{nbytes / 1e9:.2f} GB of state, {rows} x {length} tokens, {where}", taken[1:], until_whole[1:]


def show(title: str, taken: Rounds, until_whole: list[float]) -> None:
    """Print the steps of each kind, and by how much they are longer than the one of their round that is alone."""
    headings = "a step with", "steps", "ms", "longer by, ms", "lowest to highest", "more work, processor ms"
    table = Table(*headings, title=title)
    for place, kind in enumerate(KINDS):
        steps = [step for found in taken for step in found[place]]
        more = sorted(1e3 * (step.wall - found[0][0].wall) for found in taken for step in found[place])
        work = statistics.median(step.processor - found[0][0].processor for found in taken for step in found[place])
        added = f"{statistics.median(more):.0f}", f"{more[0]:.0f} to {more[-1]:.0f}", f"{1e3 * work:.0f}"
        wall = statistics.median(step.wall for step in steps)
        table.add_row(kind, str(len(steps)), f"{1e3 * wall:.0f}", *(added if place else ()))
    console = Console(width=120)
    console.print(table)
    extra = [sum(step.wall - found[0][0].wall for steps in found for step in steps) for found in taken]
    console.print(
        f"From the save to the file on the disk: {statistics.median(until_whole):.1f} s, "
        f"in which the steps together take {statistics.median(extra):.2f} s longer."
    )


def main() -> None:
    """Run the measurement as a command."""
    run(measure)


if __name__ == "__main__":
    main()
