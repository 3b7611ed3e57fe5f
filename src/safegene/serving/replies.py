"""What is sent back, as OpenAI's API says it: answers, chunks of streams, usage, logprobs, models."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel

from safegene.serving.engine import Event, Token

LEAST_LOGPROB = -9999.0
"""OpenAI's number for "very unlikely"; JSON has no −∞."""


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int) -> Usage:
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int = 0
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatDelta(BaseModel):
    index: int = 0
    delta: dict[str, str]
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int = 0
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Head(BaseModel):
    """What every answer and chunk begins with."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def of(cls, request: str, model: str, adapter: str) -> Head:
        return cls(id=request, created=int(time.time()), model=model, system_fingerprint=f"safegene-{adapter[:12]}")


class ChatCompletion(Head):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(Head):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatDelta]
    usage: Usage | None = None


class Completion(Head):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "safegene"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


def _logprob(text: str, value: float) -> TopLogprob:
    # Part of a character has no text of its own, so neither are its bytes known.
    known = None if "�" in text else list(text.encode())
    return TopLogprob(token=text, logprob=max(value, LEAST_LOGPROB), bytes=known)


class ChatForm:
    """How a chat answer is said. `eos`: tokens that are no part of it."""

    def __init__(self, head: Head, eos: set[int], logprobs: bool) -> None:
        self.head, self.eos, self.wants_logprobs = head.model_dump(), eos, logprobs

    def _logprobs(self, tokens: Sequence[Token]) -> ChatLogprobs | None:
        if not self.wants_logprobs:
            return None
        content = [
            TokenLogprob(**_logprob(t.text, t.logprob).model_dump(), top_logprobs=[_logprob(*near) for near in t.top])
            for t in tokens
            if t.id not in self.eos
        ]
        return ChatLogprobs(content=content)

    def whole(self, text: str, tokens: Sequence[Token], finish: str, usage: Usage) -> ChatCompletion:
        message = ChatMessage(content=text)
        choice = ChatChoice(message=message, logprobs=self._logprobs(tokens), finish_reason=finish)
        return ChatCompletion(**self.head, choices=[choice], usage=usage)

    def chunks(self, event: Event, first: bool) -> list[ChatChunk]:
        """The chunks of one event; the first begins with the role, as OpenAI's does."""
        said: list[ChatDelta] = [ChatDelta(delta={"role": "assistant", "content": ""})] if first else []
        logprobs = self._logprobs([event.token] if event.token else [])
        if event.text or (logprobs and logprobs.content):
            said.append(ChatDelta(delta={"content": event.text}, logprobs=logprobs))
        if event.finish:
            said.append(ChatDelta(delta={}, finish_reason=event.finish))
        return [ChatChunk(**self.head, choices=[delta]) for delta in said]

    def closing(self, usage: Usage) -> ChatChunk:
        return ChatChunk(**self.head, choices=[], usage=usage)


class CompletionForm:
    """How a completion is said. Offsets count the tokens' texts, so they are exact where no token is part of a character."""

    def __init__(self, head: Head, eos: set[int], logprobs: int | None) -> None:
        self.head, self.eos, self.wanted, self.offset = head.model_dump(), eos, logprobs, 0

    def _logprobs(self, tokens: Sequence[Token]) -> CompletionLogprobs | None:
        if self.wanted is None:
            return None
        shown = [t for t in tokens if t.id not in self.eos]
        offsets = []
        for token in shown:
            offsets.append(self.offset)
            self.offset += len(token.text)
        values = [max(t.logprob, LEAST_LOGPROB) for t in shown]
        top = [
            {text: max(value, LEAST_LOGPROB) for text, value in reversed(t.top)} | {t.text: own}
            for t, own in zip(shown, values, strict=True)
        ]
        return CompletionLogprobs(
            tokens=[t.text for t in shown], token_logprobs=values, top_logprobs=top if self.wanted else None,
            text_offset=offsets,
        )  # fmt: skip

    def whole(self, text: str, tokens: Sequence[Token], finish: str, usage: Usage) -> Completion:
        choice = CompletionChoice(text=text, logprobs=self._logprobs(tokens), finish_reason=finish)
        return Completion(**self.head, choices=[choice], usage=usage)

    def chunks(self, event: Event, first: bool) -> list[Completion]:
        """The chunk of one event, or none where it says nothing."""
        logprobs = self._logprobs([event.token] if event.token else [])
        if not (event.text or event.finish or (logprobs and logprobs.tokens)):
            return []
        choice = CompletionChoice(text=event.text, logprobs=logprobs, finish_reason=event.finish or None)
        return [Completion(**self.head, choices=[choice])]

    def closing(self, usage: Usage) -> Completion:
        return Completion(**self.head, choices=[], usage=usage)
