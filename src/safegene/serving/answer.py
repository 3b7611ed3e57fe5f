"""An answer on its way from the engine's thread to the event loop, and what can be said of it afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable

from fastapi import Request

from safegene.serving.engine import Event, Finish, Sampling, Ticket, Token

PATIENCE = 2.0
"""Seconds past its time after which an answer is given up although the engine, busy with another batch, has not said so."""


class Answer:
    """A ticket and what has come of it. Lives in the event loop; only `_emit` is called in the engine's thread."""

    def __init__(self, ids: list[int], sampling: Sampling, *, protected: bool = True) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self.ticket = Ticket(ids, sampling, self._emit, protected=protected)
        self.tokens: list[Token] = []
        self.text = ""
        self.finish: Finish = ""
        self.error = ""
        self.first_token: float | None = None

    def _emit(self, event: Event) -> None:
        # A loop that is closed has nobody who listens; the engine must go on for the others.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def cancel(self) -> None:
        """Give it up: the engine stops the row at its next step, and `events` ends at once."""
        self.ticket.cancel()
        self._events.put_nowait(Event(finish="cancelled"))

    async def events(self) -> AsyncIterator[Event]:
        """What the engine says, kept and handed on, up to the last event."""
        until = self.ticket.submitted + self.ticket.sampling.seconds + PATIENCE
        while not self.finish:
            try:
                async with asyncio.timeout(max(0.0, until - time.monotonic())):
                    event = await self._events.get()
            except TimeoutError:
                self.ticket.cancel()
                event = Event(finish="timeout", error="The server was too busy; ask again later.")
            self._keep(event)
            yield event

    def _keep(self, event: Event) -> None:
        if event.token is not None:
            self.tokens.append(event.token)
            if self.first_token is None:
                self.first_token = self.seconds
        self.text += event.text
        self.finish, self.error = event.finish, event.error

    @property
    def seconds(self) -> float:
        """Since it was given to the engine."""
        return time.monotonic() - self.ticket.submitted

    @property
    def prompt_gate(self) -> float | None:
        """Highest (s − τ) / w of the prompt; None where it was not read."""
        return highest(self.ticket.prompt_gate)

    @property
    def answer_gate(self) -> float | None:
        """Highest (s − τ) / w where a token of the answer was drawn."""
        return highest(token.gate for token in self.tokens)

    @property
    def gate(self) -> float | None:
        return highest(g for g in (self.prompt_gate, self.answer_gate) if g is not None)

    @property
    def decision(self) -> str:
        """What the adapter did (see `audit.Record`)."""
        if not self.ticket.protected:
            return "unprotected"
        if self.gate is None:
            return "none"
        return "intervened" if self.gate > 0 else "untouched"


def highest(values: Iterable[float]) -> float | None:
    """The largest, NaN left out; None where there is none."""
    return max((v for v in values if v == v), default=None)


@contextlib.asynccontextmanager
async def unless_gone(request: Request, *answers: Answer) -> AsyncIterator[None]:
    """Inside, a client that disconnects gives up its answers."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        for answer in answers:
            answer.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
