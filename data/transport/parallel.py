"""Many files at once: threads that each fetch one file, few enough per host, with progress for each and for all."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import httpx

from data.fetch import FileFetch
from data.listing import format_bytes
from data.transport.clients import client_for
from data.transport.notes import Fetched, RemoteFile, present_bytes
from data.transport.slots import Stopped

if TYPE_CHECKING:
    from rich.progress import Progress

MOST_CONNECTIONS = 16
SECONDS_BETWEEN_LINES = 30.0

Result = TypeVar("Result")


def fetch_files(
    files: Sequence[RemoteFile],
    then: Callable[[Fetched], Result],
    *,
    name: str,
    progress: Progress,
    connections_per_host: int,
    first_wait: float = 1.0,
) -> list[Result]:
    """Fetch all `files`, in parallel, and return what `then` makes of each, in the same order.

    What an earlier run left is continued. The first error stops the rest and is raised; so is Ctrl-C. Where the bars of
    `progress` are off because standard error is no terminal, a line there every half minute says how far things are.

    Args:
        then: called with each file when it is there, in the thread that fetched it.
        name: what the bars are about.
        connections_per_host: most requests at a time to one host, of all that this user fetches and streams here.
    """
    return _Transfer(files, then, name, progress, connections_per_host, first_wait).run()


class _Transfer(Generic[Result]):
    def __init__(
        self,
        files: Sequence[RemoteFile],
        then: Callable[[Fetched], Result],
        name: str,
        progress: Progress,
        connections_per_host: int,
        first_wait: float,
    ) -> None:
        self._files = files
        self._then = then
        self._progress = progress
        self._first_wait = first_wait
        self._stop = threading.Event()
        self._waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[int, Result | BaseException]] = queue.SimpleQueue()
        hosts = {httpx.URL(file.url).host for file in files}
        self._connections = connections_per_host
        self._workers = min(len(files), connections_per_host * len(hosts), max(MOST_CONNECTIONS, connections_per_host))
        sizes = [file.wanted for file in files]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        self._task = progress.add_task(name, total=total, completed=sum(present_bytes(file) for file in files))
        self._name = name

    def run(self) -> list[Result]:
        """Start the workers, collect what they bring, and stop them all when one fails."""
        for index in range(len(self._files)):
            self._waiting.put(index)
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._workers)]
        done: dict[int, Result] = {}
        try:
            for thread in threads:
                thread.start()
            spoke = time.monotonic()
            while len(done) < len(self._files):
                with suppress(queue.Empty):
                    index, result = self._results.get(timeout=0.5)
                    if isinstance(result, BaseException):
                        raise result
                    done[index] = result
                if self._progress.disable and time.monotonic() - spoke > SECONDS_BETWEEN_LINES:
                    spoke = time.monotonic()
                    self._speak(len(done))
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(timeout=5.0)
        return [done[index] for index in range(len(self._files))]

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                index = self._waiting.get_nowait()
            except queue.Empty:
                return
            file = self._files[index]
            try:
                self._results.put((index, self._then(self._fetch(file))))
            except Stopped:
                return
            except BaseException as error:
                self._results.put((index, error))

    def _fetch(self, file: RemoteFile) -> Fetched:
        present = present_bytes(file)
        name = f"  {_short(file.path)}"
        task = self._progress.add_task(name, total=file.wanted, completed=present)

        def advance(count: int) -> None:
            self._progress.advance(task, count)
            self._progress.advance(self._task, count)

        def waiting(why: str) -> None:
            self._progress.update(task, description=f"{name} ({why})" if why else name)

        try:
            return FileFetch(
                client_for(file.url), file, advance, self._stop, self._first_wait, waiting, self._connections
            ).run()
        finally:
            self._progress.remove_task(task)

    def _speak(self, done: int) -> None:
        task = next(task for task in self._progress.tasks if task.id == self._task)
        of = f" of {format_bytes(int(task.total))}" if task.total is not None else ""
        amount = f"{format_bytes(int(task.completed))}{of}, {done} of {len(self._files)} files"
        print(f"{self._name}: {amount}", file=sys.stderr)


def _short(path: Path) -> str:
    """A name for the bar: the end of the file's name before its suffixes, where its number stands."""
    stem = path.name.split(".")[0]
    return stem if len(stem) <= 20 else f"...{stem[-17:]}"
