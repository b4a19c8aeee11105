"""Tasks on a Ray cluster: each one a Ray task on a core of its own.

Every node needs this project's environment, and the data at the same address as here: on a network disk or in an object
store. datatrove's own Ray executor is not used: it swallows what a task raises, waits for ever for a killed process,
and keeps its logs in one folder of `/tmp` for all users and runs.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from config.errors import UserError
from data.pipeline.executor import Stage, Tasks, WorkersKilled, log_folder, use_one_thread

POLL_SECONDS = 0.5


class RayCluster:
    """The nodes of a running Ray cluster.

    Args:
        count: tasks at once, or None for as many as the cluster takes.
        address: `auto` or `HOST:PORT`, as `ray.init` takes it.
    """

    advice = "Look at the memory of the nodes (ray status), and whether they have this environment."

    def __init__(self, count: int | None, address: str) -> None:
        self.count = count
        self.address = address

    def __enter__(self) -> Self:
        connect(self.address, "data.ray_address=", "set data.executor=local")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        ray.shutdown()

    def tasks(self, stage: Stage, count: int, folder: Path) -> Tasks:
        """The tasks of `stage`."""
        return Tasks([stage], tasks=count, logging_dir=log_folder(folder))

    def map(self, tasks: Tasks, ranks: Sequence[int], on_progress: Callable[[int], None]) -> None:
        """Do the tasks `ranks`; `WorkersKilled` if some were lost with their process or node."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        remote = ray.remote(num_cpus=1, max_retries=0)(run_task)
        content = ray.put(pickle.dumps(tasks))
        waiting, running, lost = list(ranks), set[Any](), False
        while waiting or running:
            while waiting and len(running) < (self.count or len(ranks)):
                running.add(remote.remote(content, waiting.pop(0), os.getcwd()))
            done, _ = ray.wait(list(running), timeout=POLL_SECONDS)
            for task in done:
                running.remove(task)
                try:
                    on_progress(ray.get(task))
                except RayTaskError as error:
                    for other in running:
                        ray.cancel(other, force=True)
                    raise error.cause from error
                except RayError:
                    lost = True
        if lost:
            raise WorkersKilled


def connect(address: str, option: str, instead: str) -> None:
    """Join the Ray cluster at `address`, which was given by `option`; `instead` is what would do without one.

    Raises `UserError` where there is none, or no Ray.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(
            f"{option}{address} needs Ray, which is not installed: pip install -e '.[ray]' (on every node)."
        ) from error
    try:
        host, colon, port = address.rpartition(":")
        if colon and port.isdigit():  # Ray itself takes two minutes to give up
            socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"There is no Ray cluster at {option}{address}. Start one with ray start --head, give the address of "
            f"another, or {instead}."
        ) from error


def run_task(content: bytes, rank: int, folder: str) -> int:
    """One task in a process of the cluster; `content` is only unpacked when the number of threads is settled."""
    use_one_thread()
    with suppress(FileNotFoundError):
        os.chdir(folder)  # relative paths mean the same as where the command was typed
    tasks: Tasks = pickle.loads(content)
    return tasks.run_task(rank)
