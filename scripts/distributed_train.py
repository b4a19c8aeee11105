"""Train on several GPUs or CPU processes, of one machine or more."""

from __future__ import annotations

from typing import Annotated

import typer

from config.command import (
    Deterministic,
    Overrides,
    PrintConfig,
    Profile,
    Recipe,
    Resume,
    resolve,
    run,
    show,
    with_determinism,
)
from training.signals import expect_signals

Gpus = Annotated[int, typer.Option("--gpus", min=1, help="Processes on this machine, each with a GPU of its own.")]
Device = Annotated[
    str | None, typer.Option("--device", metavar="cpu|cuda", help="cpu runs the same training on that many processes.")
]
Nodes = Annotated[int, typer.Option("--nodes", min=1, help="Machines that train together.")]
NodeRank = Annotated[int, typer.Option("--node-rank", min=0, help="Which of them this one is, from 0.")]
Rendezvous = Annotated[
    str | None, typer.Option("--rendezvous", metavar="HOST:PORT", help="Where the machines meet, the same on all.")
]
MaxRestarts = Annotated[
    int, typer.Option("--max-restarts", min=0, help="How often a run that lost a process starts itself again.")
]


def distributed_train(
    gpus: Gpus,
    recipe: Recipe = None,
    overrides: Overrides = None,
    resume: Resume = None,
    device: Device = None,
    nodes: Nodes = 1,
    node_rank: NodeRank = 0,
    rendezvous: Rendezvous = None,
    max_restarts: MaxRestarts = 0,
    deterministic: Deterministic = False,
    profile: Profile = False,
    print_config: PrintConfig = False,
) -> None:
    """Train on several GPUs or CPU processes, of one machine or more.

    Starts scripts/train.py in every process through torchrun's elastic launcher.
    The batch is dealt to the processes, so the run learns what it would learn on
    one device. On several machines, type the same line on each, but for its
    --node-rank. With --max-restarts, a process or machine that is lost does not
    end the run: the others wait for another one in its place, and all go on from
    the latest checkpoint.
    """
    settings = [*with_determinism(overrides, deterministic), *([f"training.device={device}"] if device else [])]
    if resume is None:
        resolve(recipe, settings, print_config)
    from pathlib import Path

    from training.launch import Machines, check_gpus, launch
    from training.pretraining import check_command_line
    from training.restarts import AUTO, named, own_checkpoint
    from training.resume import run_config

    machines = Machines(gpus, nodes, node_rank, rendezvous, max_restarts)
    recipes = [recipe] if recipe else []
    if max_restarts:
        settings, resume = named(recipes, settings, resume, nodes), AUTO
    restarting = resume == AUTO
    config, checkpoint = run_config(recipes, settings, own_checkpoint(recipes, settings) if restarting else resume)
    show(config, print_config)
    if config.training.device != "cpu":
        check_gpus(gpus)
    check_command_line(config, checkpoint, machines.world_size)
    arguments = [*(["--config", str(recipe)] if recipe else []), *settings]
    arguments += ["--resume", AUTO if restarting else str(checkpoint)] if restarting or checkpoint else []
    arguments += ["--profile"] if profile else []
    script = Path(__file__).with_name("train.py")
    status = launch(script, arguments, machines, share_cores=config.training.device == "cpu")
    if status:
        raise typer.Exit(status)


def main() -> None:
    """Run the command line."""
    expect_signals()
    run(distributed_train)


if __name__ == "__main__":
    main()
