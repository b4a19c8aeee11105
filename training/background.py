"""Checkpoints written by a process of their own, which is replaced where it dies.

The copy that it writes from is made by a thread while the next step runs forward and backward, which read the weights
but change nothing; only the update of that step has to wait for the end of the copy.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread

import torch

from training.staging import Staging, stream_after_the_step
from training.writer import AnyJob, Outcome

ROOT = Path(__file__).parents[1]
PROGRAM = "from training.writer import main; main()"
ATTEMPTS = 3
MakeJob = Callable[[Staging, torch.cuda.Stream | None], AnyJob]
NOT_ITS_BUSINESS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


class BackgroundWriter:
    """Writes one checkpoint at a time. Everything in `descriptors` stays open until its process has ended as well."""

    def __init__(self, say: Callable[[str], None], descriptors: tuple[int, ...] = ()) -> None:
        self._say = say
        self._descriptors = descriptors
        self._staging = Staging(say)
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._job: AnyJob | None = None
        self._attempts = 0
        self._preparation: Thread | None = None
        self._copying: Future[AnyJob] | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint has been handed over of which `result` has not told yet."""
        return self._job is not None or self._copying is not None

    def prepare(self, nbytes: int) -> None:
        """Make ready for states of so many bytes, so that the first `submit` takes no longer than later ones."""
        if self._process is None:
            self._start()
        self._preparation = Thread(target=self._staging.reserve, args=(nbytes,), name="checkpoint-memory")
        self._preparation.start()

    def submit(self, make: MakeJob) -> None:
        """Begin to `make` a job, for which it copies tensors that may not change before `settle`; then have it done.

        Not while `busy`: the writer still reads the last copy.
        """
        assert not self.busy, "the last checkpoint is still being written"
        self._finish_preparation()
        if self._process is None:
            self._start()
        stream = stream_after_the_step()
        copier = ThreadPoolExecutor(1, "checkpoint-copy")  # another one for each copy: its priority falls on the way
        self._copying = copier.submit(make, self._staging, stream)
        copier.shutdown(wait=False)

    def settle(self) -> None:
        """Wait until the tensors of the last `submit` may change, and hand its job over."""
        if self._copying is not None:
            copying, self._copying = self._copying, None
            self._staging.help()
            self._job = copying.result()
            self._attempts = 0
            self._hand_over()

    def result(self, wait: bool) -> Outcome | None:
        """What came of the job; None where it is not done and `wait` is false.

        A writer that has died is replaced, and its work handed over again.
        """
        if self._copying is not None and not (wait or self._copying.done()):
            return None
        self.settle()
        assert self._job is not None and self._connection is not None
        while True:
            try:
                if not self._connection.poll(None if wait else 0):
                    return None
                outcome: Outcome = self._connection.recv()
                break
            except (EOFError, ConnectionError):
                self._bury()
            if self._attempts == ATTEMPTS:
                path = self._job.path
                outcome = Outcome(path, error=f"The process that was to write {path} died {ATTEMPTS} times.")
                break
            self._hand_over()
        self._job = None
        return outcome

    def close(self) -> None:
        """Let the writer finish and end, and give the memory back."""
        if self._copying is not None:
            wait([self._copying])
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.wait()
        self._finish_preparation()
        self._staging.close()

    def _finish_preparation(self) -> None:
        if self._preparation is not None:
            self._preparation.join()
            self._preparation = None

    def _hand_over(self) -> None:
        self._attempts += 1
        if self._process is None:
            self._start()
        assert self._connection is not None
        with suppress(ConnectionError):  # `result` finds out
            self._connection.send(self._job)

    def _bury(self) -> None:
        assert self._process is not None and self._connection is not None
        self._connection.close()
        status = self._process.wait()
        self._process = None
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        self._say(f"warning: the process that writes checkpoints ended with {how}; another one takes over.")

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        # A signal to the whole group of processes is the run's to answer; a blocked one stays so in the new process.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_ITS_BUSINESS)
        try:
            with theirs:
                shared = (theirs.fileno(), self._staging.descriptor)
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", PROGRAM, *map(str, shared)],
                    pass_fds=(*shared, *self._descriptors),
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                    stdin=subprocess.DEVNULL,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._connection = Connection(ours.detach())
