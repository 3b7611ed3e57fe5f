"""A limit on the time of an answer, around vLLM's application."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safegene.serving.protocol import ApiError, ErrorLine


class Deadline:
    """ASGI middleware for HTTP. vLLM gives up an answer, and frees its row, when its client goes away: after `seconds` that is what
    it is told. The client is told the truth: 504, or, in a stream, an error event.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self.app, self.seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        until = asyncio.get_running_loop().time() + self.seconds
        begun = streams = ended = late = False

        async def receive_until() -> Message:
            nonlocal late
            try:
                async with asyncio.timeout_at(until):
                    return await receive()
            except TimeoutError:
                late = True
                return {"type": "http.disconnect"}

        async def send_unless_late(message: Message) -> None:
            nonlocal begun, streams, ended
            if late:
                return
            if message["type"] == "http.response.start":
                begun = True
                streams = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
            else:
                ended = not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, receive_until, send_unless_late)
        except Exception:
            if not late:
                raise
        if not late or ended:
            return
        error = ApiError(504, f"The answer took longer than {self.seconds:.0f} seconds; ask for fewer tokens.")
        if not begun:
            await error.response()(scope, receive, send)
        elif streams:
            line = ErrorLine(error=error.body).model_dump_json()
            await send({"type": "http.response.body", "body": f"data: {line}\n\ndata: [DONE]\n\n".encode()})
