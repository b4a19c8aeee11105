"""The runs of a search on a Ray cluster: each in an actor that has a share of the cores, and a GPU where there are any.

The actor starts the run as a process of its own, which sees the GPU that Ray gave it. Every node needs this project's
environment, and the folder of the command, with corpus and runs, at the same place, such as on a network disk. Where a
node is lost, the run goes on elsewhere from its last checkpoint; where the command is, Ray ends the actors, and
with them the runs, which save first.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from config.errors import UserError
from data.pipeline.on_ray import connect
from training.experiment import PlannedRun
from training.searcher import Place

MOST_LOST = 3  # nodes that a run may lose


@contextmanager
def places_on_ray(address: str, cores: int, processes: int | None) -> Iterator[list[Place]]:
    """What starts runs on the cluster at `address`, `auto` or HOST:PORT: as many as it has room for, or `processes`.

    Raises `UserError` where there is no Ray, no cluster, or room for no run of so many `cores`.
    """
    connect(address, "--ray ", "leave --ray out")
    import ray

    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        gpus = min(1, sum(int(node.get("GPU", 0)) for node in nodes))
        room = sum(
            min(int(node.get("CPU", 0)) // cores, int(node.get("GPU", 0)) if gpus else 1 << 30) for node in nodes
        )
        if room < 1:
            most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
            raise UserError(f"No node of the Ray cluster has --cores {cores}; the largest has {most}.")

        def start(run: PlannedRun) -> RayRun:
            return RayRun(run, cores, gpus)

        yield [start] * min(room, processes or room)
    finally:
        ray.shutdown()


class RayRun:
    """A run on the cluster, which `training.searcher` watches like a process of its own (its `Process`)."""

    def __init__(self, run: PlannedRun, cores: int, gpus: int) -> None:
        self.returncode: int | None = None
        self._run, self._cores, self._gpus = run, cores, gpus
        self._lost = 0
        self._begin()

    def poll(self) -> int | None:
        """The exit status; None while it waits for room or runs. After `MOST_LOST` lost nodes, that of a killed one."""
        import ray
        from ray.exceptions import RayActorError

        if self.returncode is not None:
            return self.returncode
        done, _ = ray.wait([self._status], timeout=0)
        if not done:
            return None
        try:
            self.returncode = ray.get(self._status)
        except RayActorError:
            self._lost += 1
            if self._lost > MOST_LOST:
                self.returncode = -9
            else:
                self._begin()
        if self.returncode is not None:
            ray.kill(self._actor)
        return self.returncode

    def terminate(self) -> None:
        """Ask it to save and stop; one that waits for room is forgotten."""
        import ray

        self._lost = MOST_LOST  # it is not begun again
        if ray.wait([self._begun], timeout=0)[0]:
            self._actor.terminate.remote()
        else:
            ray.kill(self._actor)

    def wait(self) -> int:
        """Wait for its end."""
        import ray

        while self.poll() is None:
            ray.wait([self._status], timeout=1.0)
        assert self.returncode is not None
        return self.returncode

    def _begin(self) -> None:
        import ray

        # Two threads: one waits for the run, while the other may be asked to end it.
        options: dict[str, Any] = {"num_cpus": self._cores, "num_gpus": self._gpus, "max_concurrency": 2}
        keeper: Any = ray.remote(**options)(_Keeper)
        self._actor: Any = keeper.remote(self._run, os.getcwd())
        self._begun, self._status = self._actor.begun.remote(), self._actor.status.remote()


class _Keeper:
    """What keeps a run on the node where it is."""

    def __init__(self, run: PlannedRun, folder: str) -> None:
        with suppress(FileNotFoundError):
            os.chdir(folder)  # relative paths mean the same as where the command was typed
        self._process: subprocess.Popen[bytes] = run.start()

    def begun(self) -> None:
        """Can be answered as soon as the run is there."""

    def status(self) -> int:
        """Wait for its exit status."""
        return self._process.wait()

    def terminate(self) -> None:
        """Ask it to save and stop."""
        self._process.terminate()
