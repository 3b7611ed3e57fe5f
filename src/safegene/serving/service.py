"""What the routes share: tokens in, an answer out as an object or a stream, and what is written down of it."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel
from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.types import Receive, Scope, Send

from safegene.errors import GateError
from safegene.serving.answer import Answer, unless_gone
from safegene.serving.audit import Audit, Record
from safegene.serving.door import REQUEST_ID, Limits
from safegene.serving.engine import Engine, Event, Sampling, eos_ids
from safegene.serving.metrics import Metrics
from safegene.serving.protocol import ApiError, Asked, ErrorLine, Message
from safegene.serving.replies import ChatForm, CompletionForm, Usage

T = TypeVar("T")
FAILED = ("error", "timeout", "cancelled")
SEND_SECONDS = 30.0
"""A client that takes nothing of its stream for so long is given up."""
GRACE = 15
"""Seconds that a stream may go on after the server was told to stop; `safegene serve` gives whole answers a little more."""


@dataclass(frozen=True)
class Filed:
    """Where an answer belongs; its prompt only where the audit log wants it."""

    route: str
    request_id: str
    prompt: str


class Stream(EventSourceResponse):
    """Server-sent events; `ended` is called however the stream ends."""

    def __init__(self, content: AsyncIterator[str], ended: Callable[[], None]) -> None:
        super().__init__(content, sep="\n", send_timeout=SEND_SECONDS, shutdown_grace_period=GRACE)
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(SendTimeoutError):
                await super().__call__(scope, receive, send)
        finally:
            self._ended()


class Service:
    """The engine, the tokenizer, what is going on, and where it is written down."""

    def __init__(
        self, engine: Engine, *, model_name: str, adapter_digest: str, limits: Limits, audit: Audit | None
    ) -> None:
        model = engine.loaded.model
        self.engine, self.model_name, self.adapter_digest = engine, model_name, adapter_digest
        self.limits, self.audit = limits, audit
        # A copy: the engine's thread decodes with the other, and a fast tokenizer does not bear two threads.
        self.tokenizer: Any = copy.deepcopy(engine.loaded.tokenizer)
        self.turn = asyncio.Lock()
        self.context = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self.eos = eos_ids(model)
        self.live: dict[Answer, Filed] = {}
        self.metrics = Metrics(
            armed=lambda: float(engine.armed),
            waiting=lambda: float(engine.waiting),
            running=lambda: float(max(0, len(self.live) - engine.waiting)),
        )

    async def in_turn(self, work: Callable[[], T]) -> T:
        """Tokenizer work, in a thread so that a long text does not stop the others' streams."""
        async with self.turn:
            return await asyncio.to_thread(work)

    async def chat_ids(self, messages: Sequence[Message], *, begin: bool = True, go_on: bool = False) -> list[int]:
        """The chat as the model's template writes it. Control tokens inside messages are read as text, so that a user's words
        cannot open a turn of their own. `begin`: end with the beginning of an answer; `go_on`: inside the last message.

        Raises:
            ApiError: the template refuses the conversation.
        """
        turns = [{"role": "system" if m.role == "developer" else m.role, "content": m.content} for m in messages]

        def render() -> list[int]:
            return list(
                self.tokenizer.apply_chat_template(
                    turns, tokenize=True, return_dict=False, add_generation_prompt=begin and not go_on,
                    continue_final_message=go_on, sanitize_control_tokens=True,
                )
            )  # fmt: skip

        try:
            return await self.in_turn(render)
        except Exception as error:  # a template is its author's program and may raise anything
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
            raise ApiError(
                400, f"The model's chat template refuses this conversation ({reason}); change its roles or their order.",
                param="messages",
            ) from error  # fmt: skip

    async def prompt_ids(self, prompt: str | list[int]) -> list[int]:
        """A raw prompt's tokens, with whatever the tokenizer puts before them.

        Raises:
            ApiError: a token id that the model does not have.
        """
        if isinstance(prompt, str):
            return await self.in_turn(lambda: list(self.tokenizer(prompt)["input_ids"]))
        if any(i >= self.vocabulary for i in prompt):
            raise ApiError(400, f"prompt: token ids must lie below {self.vocabulary}.", param="prompt")
        return prompt

    def max_tokens(self, prompt: int, asked: int | None, param: str) -> int:
        """How long an answer may become after a prompt of so many tokens.

        Raises:
            ApiError: an empty prompt, or more than the model or the server takes.
        """
        room = self.context - prompt
        if not prompt:
            raise ApiError(400, "The prompt is empty; write something.", param=param)
        if asked is not None and asked > self.limits.max_tokens:
            raise ApiError(400, f"This server gives at most {self.limits.max_tokens} tokens; ask for fewer.", param="max_tokens")  # fmt: skip
        if room < (asked or 1):
            raise ApiError(
                400, f"The model reads {self.context} tokens, prompt and answer together; {prompt} and {asked or 1} are too many.",
                param=param, code="context_length_exceeded",
            )  # fmt: skip
        return asked or min(room, self.limits.max_tokens)

    def sampling(self, body: Asked, prompt: int, asked: int | None, logprobs: int, param: str) -> Sampling:
        return Sampling(
            max_tokens=self.max_tokens(prompt, asked, param), temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p, seed=body.seed, stop=body.stop, logprobs=logprobs,
            seconds=self.limits.seconds,
        )  # fmt: skip

    async def begin(self, request: Request, ids: list[int], sampling: Sampling, *, protected: bool = True) -> Answer:
        """Give a prompt to the engine.

        Raises:
            ApiError: protection is not armed, the audit log cannot be written, or too much waits already.
        """
        if self.audit is not None and (refusal := self.audit.refusal()):
            raise ApiError(503, refusal)
        if self.engine.waiting >= self.limits.concurrency:
            raise ApiError(429, "Too many requests wait already; ask again later.", headers={"Retry-After": "1"})
        prompt = ""
        if self.audit is not None and self.audit.text:
            prompt = await self.in_turn(lambda: str(self.tokenizer.decode(ids)))
        answer = Answer(ids, sampling, protected=protected)
        try:
            self.engine.submit(answer.ticket)
        except GateError as error:
            raise ApiError(503, str(error)) from error
        self.live[answer] = Filed(request.scope["path"], request.scope[REQUEST_ID], prompt)
        return answer

    def settle(self, answer: Answer) -> None:
        """Write an answer down, once, and give up what has not ended."""
        filed = self.live.pop(answer, None)
        if filed is None:
            return
        answer.ticket.cancel()
        self.metrics.answered(answer.gate, answer.first_token, answer.seconds)
        if self.audit is not None:
            record = Record(
                request_id=filed.request_id, route=filed.route, model=self.model_name, adapter=self.adapter_digest,
                prompt_gate=answer.prompt_gate, answer_gate=answer.answer_gate, decision=answer.decision,
                finish=answer.finish or "cancelled", prompt_tokens=len(answer.ticket.ids),
                completion_tokens=len(answer.tokens), seconds=round(answer.seconds, 3),
            )  # fmt: skip
            self.audit.write(record, prompt=filed.prompt, answer=answer.text)

    def failure(self, answer: Answer) -> ApiError:
        """Why there is no answer."""
        if answer.finish == "timeout":
            return ApiError(504, answer.error or "The answer took too long; ask for fewer tokens.")
        if answer.finish == "cancelled":
            return ApiError(499, "The client went away, and the answer was given up.")
        return ApiError(500 if self.engine.armed else 503, answer.error)

    async def reply(self, request: Request, answer: Answer, form: ChatForm | CompletionForm, body: Asked) -> Response:
        """The answer as one JSON object, or as a stream.

        Raises:
            ApiError: it failed, of a stream before the first token.
        """
        prompt = len(answer.ticket.ids)
        events = answer.events()
        try:
            async with unless_gone(request, answer):
                # A stream, too, begins when there is something to say: until then an error still has a status of its own.
                first = await anext(events)
                if not body.stream:
                    async for _ in events:
                        pass
        except asyncio.CancelledError:  # by uvicorn, whose patience after SIGTERM is at its end
            self.settle(answer)
            raise ApiError(503, "The server is stopping; ask again.") from None
        if answer.finish in FAILED and not (body.stream and answer.tokens):
            self.settle(answer)
            raise self.failure(answer)
        if not body.stream:
            self.settle(answer)
            whole = form.whole(answer.text, answer.tokens, answer.finish, Usage.of(prompt, len(answer.tokens)))
            return Response(whole.model_dump_json(), media_type="application/json")

        def line(chunk: BaseModel) -> str:
            return chunk.model_dump_json(exclude=None if body.wants_usage else {"usage"})

        async def lines() -> AsyncIterator[str]:
            opening = True
            async for event in chained(first, events):
                if event.finish in FAILED:
                    yield ErrorLine(error=self.failure(answer).body).model_dump_json()
                    break
                for chunk in form.chunks(event, opening):
                    yield line(chunk)
                opening = False
            else:
                if body.wants_usage:
                    yield line(form.closing(Usage.of(prompt, len(answer.tokens))))
            yield "[DONE]"

        return Stream(lines(), lambda: self.settle(answer))


async def chained(first: Event, rest: AsyncIterator[Event]) -> AsyncIterator[Event]:
    yield first
    async for event in rest:
        yield event
