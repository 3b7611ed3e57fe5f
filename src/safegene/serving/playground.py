"""The playground's comparison: one prompt with the adapter and without it. The only place that makes an unprotected ticket; its route
exists only where the server was started with the playground."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel

from safegene.serving.answer import Answer
from safegene.serving.engine import Sampling
from safegene.serving.protocol import CompareRequest
from safegene.serving.service import FAILED, Service, Stream


class Side(BaseModel):
    """One event of a comparison: a side's prompt, a piece of its answer with the gate where it was drawn, or its end."""

    side: str
    prompt: list[dict[str, Any]] | None = None
    text: str | None = None
    gate: float | None = None
    finish: str | None = None
    decision: str | None = None
    error: str | None = None
    seconds: float | None = None
    prompt_gate: float | None = None
    answer_gate: float | None = None


async def compare(service: Service, request: Request, body: CompareRequest) -> Response:
    """Both sides as server-sent events, the adapted one first, as the engine answers them.

    Raises:
        ApiError: see `Service.chat_ids`, `Service.max_tokens`, `Service.begin`.
    """
    ids = await service.chat_ids(body.messages)
    sampling = Sampling(
        max_tokens=service.max_tokens(len(ids), body.max_tokens, "messages"), temperature=body.temperature,
        seconds=service.limits.seconds,
    )  # fmt: skip
    words = await service.in_turn(lambda: [str(service.tokenizer.decode([i])) for i in ids])
    adapted = await service.begin(request, ids, sampling)
    try:
        plain = await service.begin(request, ids, sampling, protected=False)
    except BaseException:
        service.settle(adapted)
        raise

    async def lines() -> AsyncIterator[str]:
        for side, answer in (("with", adapted), ("without", plain)):
            async for event in side_events(service, side, answer, words):
                yield event.model_dump_json(exclude_none=True)
            if answer.finish in FAILED:
                break  # where protection failed, nothing is shown without it either
        yield "[DONE]"

    def ended() -> None:
        service.settle(adapted)
        service.settle(plain)

    return Stream(lines(), ended)


async def side_events(service: Service, side: str, answer: Answer, words: list[str]) -> AsyncIterator[Side]:
    """One side from its prompt, where the gate was read there, to its end. `words`: the prompt's tokens as text."""
    begun = False
    async for event in answer.events():
        if not begun and answer.ticket.prompt_gate:
            read = zip(words, answer.ticket.prompt_gate, strict=True)
            yield Side(side=side, prompt=[{"text": word, "gate": number(gate)} for word, gate in read])
            begun = True
        yield Side(side=side, text=event.text, gate=number(event.token.gate) if event.token else None)
    yield Side(
        side=side, finish=answer.finish, decision=answer.decision, seconds=round(answer.seconds, 2),
        error=service.failure(answer).body.message if answer.finish in FAILED else None,
        prompt_gate=answer.prompt_gate, answer_gate=answer.answer_gate,
    )  # fmt: skip


def number(gate: float) -> float | None:
    """A gate's opening as JSON can hold it: NaN, where it was not read, becomes null."""
    return round(gate, 3) if gate == gate else None
