"""Files over HTTP that are continued at the byte after an interruption and verified while they arrive.

A file `name` is written to `name.part`. Beside it `name.fetch` says of which content that is a part: the address, the
strong ETag of the answer, the publisher's checksum. After an interruption, `kill -9` included, the part is hashed again
from disk and the rest is asked for with `Range` and `If-Range`, so a server whose file has changed sends it whole.
When size and checksum are right the part takes its name. What a server packs on the way is unpacked as it comes, and
cannot be continued. Errors that pass (429, 5xx, broken connections) are tried
again, after as long as `Retry-After` says, for as long as tries bring new bytes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import httpx
import tenacity

from config.files import disk_errors
from data.transport.notes import Fetched, RemoteFile, finished, read_note, unfinished_bytes, write_note
from data.transport.packing import own_content, packing_of
from data.transport.retry import (
    FRUITLESS_TRIES,
    FetchError,
    Passing,
    check_status,
    network,
    strong_etag,
    total_size,
    waiting_time,
)
from data.transport.slots import CONNECTIONS, Stopped, connection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from data.transport.notes import Note

DAMAGED_TRIES = 3


class FileFetch:
    """One file being fetched with `client`; `run()` returns when it is complete.

    Args:
        advance: called with the number of bytes that came in, or minus those that turned out worthless.
        stop: makes `run` raise `Stopped` at the next chunk or wait.
        first_wait: seconds before the second try; it doubles with every try that brings nothing.
        waiting: called with what is waited for before each new try, and with nothing when it begins.
        connections: most requests at a time to the host, of all that this user fetches and streams on this machine.
    """

    def __init__(
        self,
        client: httpx.Client,
        file: RemoteFile,
        advance: Callable[[int], None] = lambda count: None,
        stop: threading.Event | None = None,
        first_wait: float = 1.0,
        waiting: Callable[[str], None] = lambda why: None,
        connections: int = CONNECTIONS,
    ) -> None:
        self._client = client
        self._file = file
        self._advance = advance
        self._stop = stop or threading.Event()
        self._first_wait = first_wait
        self._waiting = waiting
        self._connections = connections
        self._in_parts = True
        self._part = file.part
        self._digests = _Digests(file)
        self._length = 0
        self._best = 0
        self._fruitless = 0
        self._damaged = 0

    def run(self) -> Fetched:
        """Fetch, or go on fetching, until the file is there. Raises `FetchError` when that is of no use any more."""
        done = finished(self._file)
        if done is not None:
            return done
        with disk_errors(self._part):
            self._part.parent.mkdir(parents=True, exist_ok=True)
            self._take_up_beginning()
            self._file.path.unlink(missing_ok=True)
            self._recover()
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Passing),
            after=self._count,
            wait=lambda state: waiting_time(state, self._fruitless, self._first_wait),
            stop=lambda state: self._fruitless >= FRUITLESS_TRIES or self._damaged >= DAMAGED_TRIES,
            before_sleep=self._say,
            sleep=tenacity.nap.sleep_using_event(self._stop),
            reraise=True,
        )
        try:
            retrying(self._try)
        except Passing as error:
            raise FetchError(
                f"{self._file.url} could not be fetched: {error}. Try again later.", error.status
            ) from error
        return self._finish()

    def _count(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self._damaged += isinstance(error, Passing) and error.damaged
        self._fruitless = 0 if self._length > self._best else self._fruitless + 1
        self._best = max(self._best, self._length)

    def _say(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        why = getattr(error, "status", None) or ("damaged" if getattr(error, "damaged", False) else "cut")
        self._waiting(f"{why}, waiting {state.next_action.sleep if state.next_action else 0:.0f} s")

    def _take_up_beginning(self) -> None:
        """Make a file of which only the beginning was wanted so far the part of what is wanted now."""
        note, wanted = read_note(self._file), self._file.wanted
        if note is None or note.size is None or not self._file.path.exists() or self._part.exists():
            return
        if note.size == self._file.path.stat().st_size and (wanted is None or note.size < wanted):
            # A copy, since the file may be the same one as in an earlier download that is still in use.
            shutil.copyfile(self._file.path, self._part)
            self._file.path.unlink()
            write_note(self._file, etag=note.etag, sent_as_is=note.sent_as_is)

    def _recover(self) -> None:
        """Take up the part that is on disk, if it is one of the content that is wanted now."""
        length = unfinished_bytes(self._file)
        if not length:
            return
        if self._file.take is not None and length > self._file.take:
            os.truncate(self._part, self._file.take)
        with open(self._part, "rb") as part:
            while block := part.read(1 << 20):
                self._check_stop()
                self._digests.update(block)
                self._length += len(block)
        self._best = self._length

    def _try(self) -> None:
        """One request, from where the part ends to the end of the file."""
        self._check_stop()
        self._waiting("")
        if self._length and self._length == self._file.wanted:
            self._verify(self._file.size)
            return
        headers = {"Accept-Encoding": "identity"}
        note = read_note(self._file)
        if self._length or self._file.take is not None and self._in_parts:
            end = "" if self._file.take is None else self._file.take - 1
            headers["Range"] = f"bytes={self._length}-{end}"
        if self._length:
            if note is not None and note.etag is not None:
                headers["If-Range"] = note.etag
        with (
            network(),
            connection(self._file.url, self._connections, self._stop, self._waiting),
            self._client.stream("GET", self._file.url, headers=headers) as response,
        ):
            total, content = self._accept(response, note)
            with disk_errors(self._part), open(self._part, "r+b" if self._length else "wb") as part:
                part.seek(self._length)
                part.truncate()
                for chunk in content:
                    self._check_stop()
                    if self._file.take is not None:
                        chunk = chunk[: self._file.take - self._length]
                    part.write(chunk)
                    self._digests.update(chunk)
                    self._length += len(chunk)
                    self._advance(len(chunk))
                    if self._enough():
                        break
        self._verify(total)

    def _enough(self) -> bool:
        """Whether to stop reading: the beginning that is wanted is here, or more than there should be."""
        if self._file.take is not None:
            return self._length >= self._file.take
        return self._file.size is not None and self._length > self._file.size

    def _accept(self, response: httpx.Response, note: Note | None) -> tuple[int | None, Iterator[bytes]]:
        """Check the head of the answer and make the part fit it.

        The length of the whole file, where it is told, and the bytes that follow those of the part.
        """
        if response.status_code == 416:
            self._discard()
            raise Passing("the part on disk is longer than the file", damaged=True)
        check_status(response)
        etag = strong_etag(response)
        total = total_size(response)
        if response.status_code == 206 and self._length:
            same = note is None or note.etag is None or etag is None or etag == note.etag
            if not same or not response.headers.get("Content-Range", "").startswith(f"bytes {self._length}-"):
                self._discard()
                raise Passing("the file changed meanwhile")
            if packing_of(response) is not None and not (note is not None and note.sent_as_is):
                self._refuse_parts()
            return total, response.iter_raw()
        self._discard()
        content, unpacked = own_content(response, self._file.url)
        if unpacked and response.status_code == 206:
            self._refuse_parts()
        total = None if unpacked else total
        whole = response.status_code == 200
        if whole and self._file.size is not None and total is not None and total != self._file.size:
            raise Passing(f"it has {total} bytes instead of {self._file.size}", damaged=True)
        write_note(self._file, etag=etag, sent_as_is=packing_of(response) is not None and not unpacked)
        return total, content

    def _refuse_parts(self) -> None:
        """Begin anew without asking for a part: those of what is packed on the way are no parts of the file."""
        self._discard()
        self._in_parts = False
        raise Passing("it is sent packed", wait=0.0)

    def _verify(self, total: int | None) -> None:
        """Discard the part and raise `Passing` if it is not the file that the publisher or the answer describes."""
        total = total if self._file.size is None else self._file.size
        size = self._file.take if total is None else min(total, self._file.take or total)
        if size is not None and self._length < size:
            raise Passing("the connection was cut")
        problem = None
        if size is not None and self._length > size:
            problem = f"more came than its {size} bytes"
        elif size == total and not self._digests.right():
            problem = f"its {self._digests.algorithm} is not what the publisher states"
        if problem is not None:
            self._discard()
            raise Passing(problem, damaged=True)

    def _discard(self) -> None:
        self._advance(-self._length)
        self._length = 0
        self._digests = _Digests(self._file)
        with disk_errors(self._part), open(self._part, "wb"):
            pass

    def _finish(self) -> Fetched:
        sha256 = self._digests.sha256.hexdigest()
        with disk_errors(self._part):
            with open(self._part, "rb+") as part:
                os.fsync(part.fileno())
            note = read_note(self._file)
            etag, as_is = (note.etag, note.sent_as_is) if note else (None, False)
            write_note(self._file, etag, self._length, sha256, as_is)
            os.replace(self._part, self._file.path)
        return Fetched(self._file, self._length, sha256, etag)

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped


class _Digests:
    """The publisher's checksum of a file and its SHA-256, over the bytes so far."""

    def __init__(self, file: RemoteFile) -> None:
        self.sha256 = hashlib.sha256()
        self.algorithm, self._expected = file.checksum or ("sha256", "")
        self._other: hashlib._Hash | None = None
        if self.algorithm == "git-sha1":
            self._other = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
        elif self.algorithm != "sha256":
            self._other = hashlib.new(self.algorithm)

    def update(self, data: bytes) -> None:
        """Add `data`."""
        self.sha256.update(data)
        if self._other is not None:
            self._other.update(data)

    def right(self) -> bool:
        """Whether the checksum is the expected one, if any is."""
        return not self._expected or (self._other or self.sha256).hexdigest() == self._expected
