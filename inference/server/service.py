"""One thread drives the engine; requests come to it from the event loop, and what it writes goes back there.

    event loop                              engine thread
    reserve() -> Generation
    generation.begin(requests)   --------->  Engine.submit
    generation.batches()         <---------  Engine.step, all pieces of a step in one call
    generation.close()           --------->  Engine.cancel of what is unfinished

A generation *holds places*, one for each of its sequences, from `reserve` to `close`. The engine's slots and the queue
before them are that many places, so the engine never has more waiting than the queue may hold. What a slow reader has
not fetched stays with its generation, which is bounded by the tokens that it asked for; it gets them joined.

Both threads are of one interpreter, of which one at a time executes Python. The event loop does little at a time, and
would often wait for its turn where the engine writes fast; so the engine stands back where a first token is waited for.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from config.errors import UserError
from inference.engine import Engine, Piece, Request
from inference.server.errors import ApiError, invalid, shutting_down, too_busy
from inference.server.logs import FIELD
from inference.server.metrics import Metrics

log = logging.getLogger("quern.server")

STANDS_BACK = 0.005  # seconds at most, for the event loop to send a first token on

Arrival = tuple[int, Piece]  # which of a generation's sequences, and what it wrote


class Generation:
    """What the engine writes for one request to the server. Used in the event loop only."""

    def __init__(self, service: Service, places: int) -> None:
        self.places = places
        self.started = time.monotonic()
        self._service = service
        self._arrived: list[Arrival] = []
        self._news = asyncio.Event()
        self._failure: ApiError | None = None
        self._last = [0.0] * places
        self._unfinished: set[int] = set()

    @property
    def running(self) -> int:
        """How many of its sequences have begun to write, and have not finished."""
        return sum(self._last[place] > 0 for place in self._unfinished)

    @property
    def waiting(self) -> int:
        """How many of its sequences wait for a slot."""
        return len(self._unfinished) - self.running

    def begin(self, requests: Sequence[Request]) -> None:
        """Hand the requests to the engine, one for each place."""
        self._unfinished = set(range(len(requests)))
        self._service.submit(self, requests)
        if self._failure is not None:
            self._stop()

    async def batches(self) -> AsyncIterator[list[Arrival]]:
        """What has come since the last time, until all sequences have finished; raises what `fail` was given."""
        while self._unfinished or self._arrived:
            await self._news.wait()
            self._news.clear()
            if self._failure is not None:
                raise self._failure
            arrived, self._arrived = self._arrived, []
            if arrived:
                yield arrived

    def deliver(self, arrived: list[Arrival]) -> None:
        """Take what a step of the engine wrote."""
        now, metrics = time.monotonic(), self._service.metrics
        for place, piece in arrived:
            if place not in self._unfinished:
                continue  # on its way when the generation was closed
            if piece.finish == "error":
                log.error("a form could not be followed", extra={FIELD: {"reason": piece.failure}})
                self.fail(ApiError(500, piece.failure or "", "form_failed"))
                return
            if self._last[place]:
                metrics.time_per_token.observe(now - self._last[place])
            else:
                metrics.time_to_first_token.observe(now - self.started)
            metrics.generated_tokens.inc()
            self._last[place] = now
            self._arrived.append((place, piece))
            if piece.finish is not None:
                self._unfinished.discard(place)
        self._news.set()

    def fail(self, error: ApiError) -> None:
        """End it: the engine's slots are free at once, and the reader gets the error."""
        if self._failure is None:
            self._failure = error
            self._news.set()
            self._stop()

    def close(self) -> None:
        """Cancel what is unfinished and give the places back."""
        self._stop()
        self._service.release(self)

    def _stop(self) -> None:
        if self._unfinished:
            self._unfinished.clear()
            self._service.cancel(self)


class Service:
    """The engine and its thread. `places` are the slots and the length of the queue together."""

    def __init__(self, make_engine: Callable[[], Engine], places: int, metrics: Metrics) -> None:
        self.metrics = metrics
        self.places = places
        self._make_engine = make_engine
        self._commands: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._generations: set[Generation] = set()
        self._numbers: dict[int, tuple[Generation, int]] = {}  # of the engine's thread alone
        self._silent: set[int] = set()  # of those, what has written nothing yet
        self._sent = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = False
        self._ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self.healthy = True
        metrics.watch(lambda: self.running, lambda: self.waiting)

    @property
    def running(self) -> int:
        """Sequences that are being written."""
        return sum(generation.running for generation in list(self._generations))

    @property
    def waiting(self) -> int:
        """Sequences that wait for a slot."""
        return sum(generation.waiting for generation in list(self._generations))

    def start(self) -> None:
        """Start the thread, which makes the engine and lets it write a token; raises what goes wrong in that."""
        self._thread.start()
        if (error := self._ready.get()) is not None:
            raise error

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Say in which event loop the generations live."""
        self._loop = loop

    def reserve(self, places: int) -> Generation:
        """Places for so many sequences; `ApiError` 429 where there are not enough, 503 when the server is ending."""
        if self._closing:
            raise shutting_down()
        if places > self.places:
            raise invalid("n", f"{places:,} texts were asked for at once, this server takes {self.places:,} at most")
        if sum(generation.places for generation in self._generations) + places > self.places:
            raise too_busy()
        generation = Generation(self, places)
        self._generations.add(generation)
        return generation

    def release(self, generation: Generation) -> None:
        """Take places back."""
        self._generations.discard(generation)

    def refuse(self) -> None:
        """Take no more requests."""
        self._closing = True

    def fail_all(self) -> None:
        """End all that is still being written."""
        for generation in list(self._generations):
            generation.fail(shutting_down())

    def stop(self) -> None:
        """End the thread after the step that it is in."""
        self._commands.put(None)
        self._thread.join()

    def submit(self, generation: Generation, requests: Sequence[Request]) -> None:
        """Queue the sequences of a generation."""

        def act(engine: Engine) -> None:
            try:
                for place, request in enumerate(requests):
                    number = engine.submit(request)
                    self._numbers[number] = (generation, place)
                    self._silent.add(number)
            except UserError as error:
                self._tell(generation.fail, ApiError(400, str(error), "invalid_value"))
            except Exception as error:
                log.exception("the engine could not take a request")
                self._tell(generation.fail, _failed(error))

        self._commands.put(act)

    def cancel(self, generation: Generation) -> None:
        """Free the slots of a generation."""

        def act(engine: Engine) -> None:
            for number in [number for number, (owner, _) in self._numbers.items() if owner is generation]:
                del self._numbers[number]
                self._silent.discard(number)
                engine.cancel(number)

        self._commands.put(act)

    def _run(self) -> None:
        try:
            engine = self._make_engine()
            _write_a_token(engine)
        except BaseException as error:
            self._ready.put(error)
            return
        self._ready.put(None)
        while self._obey(engine):
            before = engine.proposed_tokens, engine.accepted_tokens
            try:
                pieces = engine.step()
            except Exception as error:
                self._recover(engine, error)
            else:
                self.healthy = True
                self.metrics.proposed_tokens.inc(engine.proposed_tokens - before[0])
                self.metrics.accepted_tokens.inc(engine.accepted_tokens - before[1])
                self._hand_out(pieces)

    def _obey(self, engine: Engine) -> bool:
        """Do what the event loop has asked for, waiting while there is nothing else to do; False at the end."""
        while True:
            try:
                command = self._commands.get(block=not engine.busy)
            except queue.Empty:
                return True
            if command is None:
                return False
            command(engine)

    def _hand_out(self, pieces: Sequence[Piece]) -> None:
        arrived: dict[Generation, list[Arrival]] = {}
        for piece in pieces:
            if piece.sequence in self._numbers:
                generation, place = self._numbers[piece.sequence]
                arrived.setdefault(generation, []).append((place, piece))
                if piece.finish is not None:
                    del self._numbers[piece.sequence]
        if not arrived:
            return
        first = not self._silent.isdisjoint(piece.sequence for piece in pieces)
        self._silent.difference_update(piece.sequence for piece in pieces)
        self._sent.clear()
        self._tell(_deliver, arrived, self._sent)
        if first:
            self._sent.wait(STANDS_BACK)

    def _recover(self, engine: Engine, error: Exception) -> None:
        """End all sequences of a step that failed, so that the next ones find an empty engine; see whether it works."""
        self.healthy = False
        log.exception("the engine failed")
        for generation in {owner for owner, _ in self._numbers.values()}:
            self._tell(generation.fail, _failed(error))
        for number in self._numbers:
            engine.cancel(number)
        self._numbers.clear()
        self._silent.clear()
        try:
            _write_a_token(engine)
        except Exception:
            log.exception("the engine still fails")
        else:
            self.healthy = True

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            pass  # the event loop has ended, and with it those who would read


def _write_a_token(engine: Engine) -> None:
    for _ in engine.generate([Request([], max_new_tokens=1)]):
        pass


def _failed(error: Exception) -> ApiError:
    message = str(error) if isinstance(error, UserError) else "The server failed while it wrote. Its log says more."
    return ApiError(500, message, "engine_failed")


def _deliver(arrived: dict[Generation, list[Arrival]], sent: threading.Event) -> None:
    for generation, pieces in arrived.items():
        generation.deliver(pieces)
    asyncio.get_running_loop().call_soon(sent.set)  # after the tasks that this has woken
