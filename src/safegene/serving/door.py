"""The door: key, number and size of requests, looked at before anything of them is parsed.

It stands around the whole application, this project's or vLLM's, as plain ASGI, so that a stream passes through it piece by piece.
Whatever is not listed as open needs the key.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safegene.serving.protocol import ApiError

OPEN = ("/", "/health", "/live", "/metrics", "/openapi.json")
"""What probes, scrapers and browsers ask for without a key; none of it runs the model."""
POSTS = ("/v1/chat/completions", "/v1/completions", "/playground/compare")
MODELS = "/v1/models"
REQUEST_ID = "safegene.request_id"
"""Where in the ASGI scope a request's id stands; it is also sent as x-request-id."""


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may take.

    Attributes:
        body: bytes of a request's body.
        max_tokens: new tokens of an answer.
        concurrency: requests that are answered or wait; further ones are told to come back.
        seconds: until an answer is cut off, waiting included, and until a body must have arrived.
    """

    body: int = 1 << 20
    max_tokens: int = 1024
    concurrency: int = 64
    seconds: float = 120.0


def route_of(path: str) -> str:
    """A path as the figures name it: clients must not be able to make up new ones."""
    if path in OPEN or path in POSTS or path == MODELS:
        return path
    return f"{MODELS}/{{id}}" if path.startswith(f"{MODELS}/") else "other"


@dataclass(frozen=True)
class Passage:
    """A request that has been answered or refused. `status` is 499 where the client went away before anything was said."""

    request_id: str
    path: str
    status: int
    seconds: float


class Door:
    """ASGI middleware. `passed` is called once a request, at its end."""

    def __init__(self, app: ASGIApp, *, limits: Limits, api_key: str, passed: Callable[[Passage], None]) -> None:
        self.app, self.limits, self.passed = app, limits, passed
        self.key = api_key.encode()
        self.inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.monotonic()
        request_id = scope[REQUEST_ID] = uuid.uuid4().hex
        status = 499

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._admit(scope, receive, named)
        except Exception:
            status = 500
            raise
        finally:
            self.passed(Passage(request_id, scope["path"], status, round(time.monotonic() - start, 3)))

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        posts = scope["method"] == "POST"
        try:
            self._check_key(scope)
            if posts:
                self._check_room(scope)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        self.inside += posts
        try:
            try:
                body = await self._read(receive)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
            if body is not None:
                await self.app(scope, _again(body, receive), send)
        finally:
            self.inside -= posts

    def _check_key(self, scope: Scope) -> None:
        if not self.key or scope["path"] in OPEN or scope["method"] == "OPTIONS":  # a browser's preflight has no key
            return
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # Header values are Latin-1 by definition; compared as bytes, for compare_digest takes ASCII strings only.
        if scheme.lower() != "bearer" or not secrets.compare_digest(given.strip().encode("latin-1"), self.key):
            raise ApiError(
                401, "The API key is missing or wrong; send it as Authorization: Bearer KEY.", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    def _check_room(self, scope: Scope) -> None:
        if self.inside >= self.limits.concurrency:
            raise ApiError(
                429, f"{self.inside} requests are being answered already; ask again later.", headers={"Retry-After": "1"}
            )  # fmt: skip
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > self.limits.body:
            raise self._too_large()

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None where the client has gone before it was sent."""
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.limits.seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.limits.body:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(
                408, f"The body did not arrive in {self.limits.seconds:.0f} seconds; send it again."
            ) from None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self.limits.body:,} bytes; send less.")


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, then what comes after it: the client's disconnection."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
