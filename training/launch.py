"""Starting a run on several devices with torchrun's elastic launcher, and how to start it again."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from config.errors import UserError
from training.signals import SAVE_NOW

GRACE = 600  # seconds that processes asked to stop get for finishing a step and saving


@dataclass(frozen=True, slots=True)
class Machines:
    """`processes` on each of `nodes` machines, this one being number `node_rank`, meeting at `rendezvous` HOST:PORT.

    Processes that are lost are started again up to `max_restarts` times, all of them together.
    """

    processes: int
    nodes: int = 1
    node_rank: int = 0
    rendezvous: str | None = None
    max_restarts: int = 0

    def __post_init__(self) -> None:
        if self.nodes > 1 and self.rendezvous is None:
            raise UserError(
                f"--nodes {self.nodes} needs --rendezvous HOST:PORT: a free port of one machine, the same on all."
            )
        if not 0 <= self.node_rank < self.nodes:
            raise UserError(f"--node-rank {self.node_rank} must lie between 0 and {self.nodes - 1} (--nodes less one).")

    @property
    def world_size(self) -> int:
        """Processes on all machines together."""
        return self.processes * self.nodes


def check_gpus(wanted: int) -> None:
    """`UserError` where this machine has fewer GPUs than `wanted`."""
    import torch

    there = torch.cuda.device_count()
    if there < wanted:
        raise UserError(
            f"--gpus {wanted}: PyTorch finds {there} GPU{'' if there == 1 else 's'} on this machine. "
            + (f"Ask for {there}, or add" if there else "Add")
            + f" --device cpu to run the same training as {wanted} processes on the CPU."
        )


def launch(script: Path, arguments: Sequence[str], machines: Machines, share_cores: bool) -> int:
    """Run `script` with `arguments` in every process through `torch.distributed.run`; returns the exit status.

    A signal is passed on to every process, which then has `GRACE` seconds to save. With `share_cores` (on a CPU) the
    cores are divided among the processes of this machine. The status is that of the first process that failed, or 128
    and the signal.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // machines.processes) if share_cores else 1))
    os.environ.setdefault("TORCH_DISTRIBUTED_DEBUG", "OFF")
    if machines.max_restarts:
        # The store that the launchers share keeps what an earlier group said, and a new launcher would wait in vain for
        # it to be said again (PyTorch 2.13). Each group makes a store of its own instead.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    options = ["--nproc-per-node", str(machines.processes), "--shutdown-timeout", str(GRACE)]
    options += ["--max-restarts", str(machines.max_restarts)]
    if machines.nodes == 1 and machines.rendezvous is None:
        options += ["--standalone"]
    else:
        options += ["--nnodes", str(machines.nodes), "--node-rank", str(machines.node_rank)]
        options += ["--rdzv-backend", "c10d", "--rdzv-id", "quern", "--rdzv-endpoint", str(machines.rendezvous)]
    # The launcher's own account of a failed process would bury the one sentence that the process has printed.
    logging.disable(logging.ERROR)
    _pass_on_save_requests()
    try:
        run.run(run.parse_args([*options, str(script), *arguments]))  # type: ignore[no-untyped-call]
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        print(f"error: process {rank} was killed by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        return 128 - failure.exitcode
    return 0


def _pass_on_save_requests() -> None:
    """SIGUSR1 asks a run to save and go on; torchrun passes on only what asks it to stop.

    It is blocked, here and so in the processes that are started, where it would otherwise end one that is not ready.
    A thread that was started before this would take the signal, and it would be lost.
    """
    import psutil

    def pass_on(number: int) -> None:
        while signal.sigwait({number}):
            for worker in psutil.Process().children():
                with suppress(psutil.NoSuchProcess):
                    worker.send_signal(number)

    if SAVE_NOW is not None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {SAVE_NOW})
        Thread(target=pass_on, args=(SAVE_NOW,), name="save-requests", daemon=True).start()


def resume_command(checkpoint: Path | None) -> str:
    """What to type to go on from `checkpoint` with as many processes as there are now."""
    where = shlex.quote(str(checkpoint)) if checkpoint else "latest"
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return f"python scripts/train.py --resume {where}"
    return f"python scripts/distributed_train.py --gpus {os.environ['LOCAL_WORLD_SIZE']} --resume {where}"
