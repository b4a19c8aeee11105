"""Settled before any test imports PyTorch, and what several files of tests start."""

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.workspace import Workspace

# Threads that spin for work slow a test down many times where other processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Commands that tests interrupt must not inherit that Ctrl-C is ignored, as in what a shell runs in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> "Workspace":
    """A workspace for all tests of a file, none of which changes what is in it."""
    from tests.workspace import make_workspace

    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture
def workspace(made: "Workspace", monkeypatch: pytest.MonkeyPatch) -> "Workspace":
    """The same, as the folder that the test works in."""
    monkeypatch.chdir(made.folder)
    return made


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """A Ray cluster of two nodes with a core each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        yield cluster.address
        cluster.shutdown()  # type: ignore[no-untyped-call]
