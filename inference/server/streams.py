"""Server-sent events, and an eye on the client while the engine writes for it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from inference.server.errors import ApiError
from inference.server.service import Generation

LAST_WORDS = 5.0  # seconds that a client has to fetch the end of a stream that ran out of time


class Watch:
    """Ends a generation when its client leaves or its time is over; closes it when the answer is done.

    `deadline` is on the clock of the event loop, in seconds.
    """

    def __init__(self, generation: Generation, receive: Receive, deadline: float) -> None:
        self.deadline = deadline
        self._generation = generation
        self._listener = asyncio.create_task(self._listen(receive))
        late = ApiError(504, "The answer took longer than this server allows.", "timeout")
        self._timer = asyncio.get_running_loop().call_at(deadline, generation.fail, late)

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._generation.fail(ApiError(499, "The client left."))

    def close(self) -> None:
        """Give back what the generation holds."""
        self._timer.cancel()
        self._listener.cancel()
        self._generation.close()


class EventStream(Response):
    """Chunks as server-sent events, closed by OpenAI's `[DONE]`; an error after the start is an event of its own."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[BaseModel], watch: Watch) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"x-accel-buffering": "no"})
        self._chunks = chunks
        self._watch = watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them as they come. A client that does not fetch them in time is cut off."""
        try:
            async with asyncio.timeout_at(self._watch.deadline + LAST_WORDS):
                await self._send_all(send)
        except TimeoutError:
            pass
        finally:
            self._watch.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for chunk in self._chunks:
                await send(_event(chunk.model_dump_json(exclude_unset=True)))
            await send(_event("[DONE]"))
        except ApiError as error:
            await send(_event(json.dumps(error.body())))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(data: str) -> dict[str, object]:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}
