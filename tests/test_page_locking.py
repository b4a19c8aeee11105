"""Memory that is page-locked for the GPU of the run, from threads that begin at another; CUDA itself is a stand-in."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread, local

import pytest
import torch

from training.staging import Staging


class Cuda(local):
    """The runtime of a machine of GPUs, whose current device is one of each thread: at first, device 0."""

    current = 0

    def __init__(self, calls: list[tuple[str, int]], status: int) -> None:
        self.calls, self.status, self.failed = calls, status, False

    @contextmanager
    def device(self, index: int) -> Iterator[None]:
        """Make a device the current one."""
        before, self.current = self.current, index
        yield
        self.current = before

    @contextmanager
    def stream(self, _stream: None) -> Iterator[None]:
        """The default stream of the current device, in a thread that CUDA has no error to lay at the door of."""
        assert not self.failed
        self.calls.append(("copy", self.current))
        yield

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        """Lock pages."""
        assert address and nbytes and not flags
        self.calls.append(("lock", self.current))
        self.failed = self.status != 0
        return self.status

    def cudaHostUnregister(self, address: int) -> None:  # noqa: N802
        """Unlock them."""
        assert address
        self.calls.append(("unlock", self.current))


@pytest.mark.parametrize("status", [0, 2])
def test_memory_is_locked_for_the_gpu_of_the_process(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    cuda = Cuda(calls, status)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device", cuda.device)
    monkeypatch.setattr(torch.cuda, "stream", cuda.stream)
    said: list[str] = []
    staging = Staging(said.append)

    def work() -> None:
        staging.reserve(mmap.PAGESIZE)
        staging.lay_out({"weight": torch.ones(10)})
        staging.lay_out({"weight": torch.ones(100_000)})  # the memory grows
        assert cuda.current == 0

    thread = Thread(target=work)
    thread.start()
    thread.join()
    staging.close()
    locked = [("lock", 3), ("copy", 3), ("unlock", 3), ("lock", 3), ("copy", 3), ("unlock", 3)]
    assert calls == (locked if status == 0 else [call for call in locked if call[0] != "unlock"])
    warning = "warning: memory for checkpoints cannot be page-locked (CUDA error 2); copies take longer."
    assert said == ([] if status == 0 else [warning]), "once"
