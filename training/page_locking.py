"""Page-locked memory, to and from which a GPU copies at the full speed of the bus."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch


class PageLock:
    """Locks memory for the GPU that was the current one where this was made, in any thread; without one, nothing.

    Which device is the current one each thread says for itself, and in a new one it is the first: whoever works there
    for another has to say so, or takes memory of the first one in every process of a machine.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        there: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._device = torch.cuda.current_device() if there else None
        self._say = say
        self._said = False

    def device(self) -> AbstractContextManager[object]:
        """Inside, the GPU is the current one of this thread."""
        return nullcontext() if self._device is None else torch.cuda.device(self._device)

    def lock(self, address: int, nbytes: int) -> bool:
        """Whether the memory is locked now. Where CUDA refuses, that is said once, and copies are slower."""
        if self._device is None:
            return False
        with ThreadPoolExecutor(1) as apart:  # a thread's next kernel would be blamed for the failure
            code = apart.submit(self._register, address, nbytes).result()
        if code and not self._said:
            self._said = True
            self._say(f"warning: memory for checkpoints cannot be page-locked (CUDA error {code}); copies take longer.")
        return not code

    def unlock(self, address: int) -> None:
        """Take back a `lock` that succeeded."""
        with self.device():
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]

    def _register(self, address: int, nbytes: int) -> int:
        with self.device():
            return int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))  # type: ignore[no-untyped-call]
