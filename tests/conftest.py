"""Settled before any test imports PyTorch, and what several files of tests start."""

import os
import signal
from collections.abc import Iterator

import pytest

# Threads that spin for work slow a test down many times where other processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Commands that tests interrupt must not inherit that Ctrl-C is ignored, as in what a shell runs in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)


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
