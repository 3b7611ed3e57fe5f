"""The embedded engine: padded micro-batches through transformers' own `generate`, one thread, every pass through the adapter.

Requests that wait are answered together, at most `max_batch` of them; those that come meanwhile wait for the next batch. That
is all the scheduling there is: vLLM is the engine for more.

Each row keeps its own sampling, length, stop strings and random numbers, so an answer does not depend on its neighbours.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from safegene.attach import Handle
from safegene.errors import GateError, SafegeneError
from safegene.models import LoadedModel

Finish = Literal["", "stop", "length", "cancelled", "timeout", "error"]


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn. Temperature 0 is greedy; `logprobs` tokens besides the drawn one are reported; `seconds` is
    the longest an answer may take, waiting included."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int = 0
    seconds: float = 120.0


@dataclass(frozen=True)
class Token:
    """A drawn token. `gate`: (s − τ) / w where it was drawn, NaN without the adapter; above 0 the adapter acted."""

    id: int
    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    gate: float


@dataclass(frozen=True)
class Event:
    """What one step gave a request: text that no later step can change, its token, and, at the end, why it ended."""

    text: str = ""
    token: Token | None = None
    finish: Finish = ""
    error: str = ""


@dataclass(eq=False)
class Ticket:
    """A request in the engine. `emit` is called in the engine's thread, in order; the last event has a `finish`.

    Attributes:
        prompt_gate: (s − τ) / w at every position of the prompt, filled before the first event.
        protected: false only on the playground's unadapted side.
    """

    ids: list[int]
    sampling: Sampling
    emit: Callable[[Event], None]
    protected: bool = True
    prompt_gate: list[float] = field(default_factory=list)
    submitted: float = field(default_factory=time.monotonic)
    ended: bool = False
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Give up the answer; the row stops at the next step."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def end(self, finish: Finish, error: str = "", text: str = "", token: Token | None = None) -> None:
        """Send the last event, once."""
        if not self.ended:
            self.ended = True
            with contextlib.suppress(Exception):  # whoever asked is gone; the others of the batch are not
                self.emit(Event(text, token, finish, error))


class Engine:
    """Answers tickets on one armed model.

    Raises:
        GateError: from `submit`, once protection has failed or the engine has stopped: nothing is served without it.
    """

    def __init__(self, loaded: LoadedModel, handle: Handle, *, max_batch: int = 16, gather: float = 0.005) -> None:
        self.loaded, self.handle = loaded, handle
        self.max_batch, self.gather = max_batch, gather
        self.failure = ""
        self._waiting: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._left: list[Ticket] = []
        self._thread = threading.Thread(target=self._run, name="safegene-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the batch that is running; what waits is told so."""
        self._waiting.put(None)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def armed(self) -> bool:
        """Whether an answer would be protected: hooks in place, thread alive, no failure seen."""
        return not self.failure and self._thread.is_alive() and bool(self.handle.status()["armed"])

    @property
    def waiting(self) -> int:
        return self._waiting.qsize() + len(self._left)

    def submit(self, ticket: Ticket) -> None:
        if not self.armed:
            raise GateError(self._disarmed())
        self._waiting.put(ticket)

    def _disarmed(self) -> str:
        return f"Protection is not armed ({self.failure or 'engine stopped, or adapter detached'}); restart the server."

    def _run(self) -> None:
        stopped = False
        while not stopped:
            batch, stopped = self._gather()
            if batch:
                self._answer(batch)
        self.failure = self.failure or "engine stopped"
        left = self._left
        while not self._waiting.empty():
            if (ticket := self._waiting.get()) is not None:
                left.append(ticket)
        for ticket in left:
            ticket.end("error", "The server is stopping; ask again.")

    def _gather(self) -> tuple[list[Ticket], bool]:
        """The next tickets of one kind, protected or not, and whether the engine is to stop after them."""
        until = time.monotonic() + self.gather
        while len(self._left) < self.max_batch:
            patience = max(0.0, until - time.monotonic()) if self._left else None
            try:
                ticket = self._waiting.get(timeout=patience)
            except queue.Empty:
                break
            if ticket is None:
                return [], True
            if not self._left:
                until = time.monotonic() + self.gather
            self._left.append(ticket)
        kind = self._left[0].protected
        batch = [t for t in self._left if t.protected is kind][: self.max_batch]
        self._left = [t for t in self._left if t not in batch]
        return batch, False

    def _answer(self, batch: Sequence[Ticket]) -> None:
        live = []
        for ticket in batch:
            if not self.armed:
                ticket.end("error", self._disarmed())
            elif ticket.cancelled:
                ticket.end("cancelled")
            elif time.monotonic() - ticket.submitted > ticket.sampling.seconds:
                ticket.end("timeout", "The server was too busy; ask again later.")
            else:
                live.append(ticket)
        if not live:
            return
        try:
            self._generate(live)
        except SafegeneError as error:  # the gate failed, the adapter was detached, or PEFT's adapters were switched
            self.failure = str(error)
            for ticket in live:
                ticket.end("error", str(error))
        except Exception as error:  # one bad batch must not end the thread: the others would wait for ever
            for ticket in live:
                ticket.end("error", f"{type(error).__name__}: {error}")

    @torch.inference_mode()
    def _generate(self, batch: Sequence[Ticket]) -> None:
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        longest = max(len(t.ids) for t in batch)
        ids = torch.tensor([[pad] * (longest - len(t.ids)) + t.ids for t in batch], device=model.device)
        mask = torch.tensor([[0] * (longest - len(t.ids)) + [1] * len(t.ids) for t in batch], device=model.device)
        protected = batch[0].protected
        with contextlib.ExitStack() as stack:
            record = None
            if protected:
                record = stack.enter_context(self.handle.recording())
            else:
                stack.enter_context(self.handle.disabled())
            rows = Rows(batch, tokenizer, eos_ids(model), record, lambda: bool(self.handle.status()["armed"]))
            model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max(t.sampling.max_tokens for t in batch),
                do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, repetition_penalty=1.0,
                logits_processor=[rows.processor], stopping_criteria=[rows.criteria], pad_token_id=pad,
            )  # fmt: skip
        for ticket in batch:
            ticket.end("length")


def eos_ids(model: Any) -> set[int]:
    """Tokens that end an answer."""
    said = model.generation_config.eos_token_id
    return set(said) if isinstance(said, list) else {said} if said is not None else set()


class Rows:
    """The rows of a batch while it runs: draws their tokens, tells their tickets, says which have ended."""

    def __init__(
        self,
        tickets: Sequence[Ticket],
        tokenizer: Any,
        eos: set[int],
        record: list[Tensor] | None,
        armed: Callable[[], bool],
    ) -> None:
        self.tickets, self.tokenizer, self.eos, self.record, self.armed = tickets, tokenizer, eos, record, armed
        self.processor, self.criteria = _Draw(self), _End(self)
        self.streams = [DecodeStream([], skip_special_tokens=True) for _ in tickets]
        self.held = [""] * len(tickets)
        self.drawn: list[list[int]] = [[] for _ in tickets]
        self.generators = [self._generator(t.sampling.seed) for t in tickets]
        self.last: list[Token | None] = [None] * len(tickets)

    @staticmethod
    def _generator(seed: int | None) -> torch.Generator:
        generator = torch.Generator()
        generator.manual_seed(seed) if seed is not None else generator.seed()
        return generator

    def draw(self, scores: Tensor) -> Tensor:
        """Choose every row's next token; scores [rows, vocabulary] → the same with only the chosen tokens left."""
        if self.record is not None and not self.armed():
            raise GateError("The adapter was detached while it was serving; nothing more is served.")
        gates = self._gates()
        logprobs = scores.float().log_softmax(-1).cpu()
        chosen = torch.full_like(scores, -math.inf)
        for i, ticket in enumerate(self.tickets):
            if ticket.ended:
                chosen[i, 0] = 0.0
                continue
            wanted = ticket.sampling
            at = int(logprobs[i].argmax()) if wanted.temperature == 0 else self._sample(logprobs[i], wanted, i)
            top = logprobs[i].topk(min(wanted.logprobs, logprobs.shape[1])) if wanted.logprobs else None
            near = [(self.tokenizer.decode([int(k)]), float(v)) for v, k in zip(*top, strict=True)] if top else []
            self.last[i] = Token(at, self.tokenizer.decode([at]), float(logprobs[i, at]), tuple(near), gates[i])
            chosen[i, at] = 0.0
        return chosen

    def _sample(self, logprobs: Tensor, wanted: Sampling, row: int) -> int:
        """Temperature, then the smallest set of tokens that holds `top_p` (Holtzman et al. 2020)."""
        sorted_, order = (logprobs / max(wanted.temperature, 1e-3)).softmax(-1).sort(descending=True)
        beyond = sorted_.cumsum(-1) - sorted_ >= wanted.top_p
        beyond[0] = False  # the likeliest is always there
        sorted_[beyond] = 0.0
        return int(order[torch.multinomial(sorted_, 1, generator=self.generators[row])])

    def _gates(self) -> list[float]:
        """(s − τ) / w at every row's last position; the first pass also fills the tickets' `prompt_gate`."""
        if self.record is None:
            return [math.nan] * len(self.tickets)
        if not self.record:
            raise GateError("A pass was made in which the gate was not read; nothing of it is served.")
        openings = torch.cat(self.record, dim=1) if len(self.record) > 1 else self.record[0]
        self.record.clear()
        for i, ticket in enumerate(self.tickets):
            if not self.drawn[i] and not ticket.prompt_gate:
                ticket.prompt_gate = openings[i, -len(ticket.ids) :].tolist()
        return [float(v) for v in openings[:, -1]]

    def advance(self, input_ids: Tensor) -> Tensor:
        """Tell the tickets what their rows drew; returns which rows have ended, [rows]."""
        ended = []
        for i, ticket in enumerate(self.tickets):
            if not ticket.ended:
                self._tell(i, ticket, self.last[i])
            ended.append(ticket.ended)
        return torch.tensor(ended, device=input_ids.device)

    def _tell(self, i: int, ticket: Ticket, token: Token | None) -> None:
        assert token is not None
        self.drawn[i].append(token.id)
        if token.id in self.eos:
            ticket.end("stop", text=self.held[i], token=token)
            return
        backend = getattr(self.tokenizer, "backend_tokenizer", self.tokenizer)
        self.held[i] += self.streams[i].step(backend, token.id) or ""
        text, stopped = until_stop(self.held[i], ticket.sampling.stop)
        if stopped:
            ticket.end("stop", text=text, token=token)
        elif len(self.drawn[i]) >= ticket.sampling.max_tokens:
            ticket.end("length", text=self.held[i], token=token)
        elif ticket.cancelled:
            ticket.end("cancelled", text=text, token=token)
        elif time.monotonic() - ticket.submitted > ticket.sampling.seconds:
            ticket.end("timeout", "The answer took too long and was cut off.", text, token)
        else:
            self.held[i] = self.held[i][len(text) :]
            with contextlib.suppress(Exception):
                ticket.emit(Event(text, token))


def until_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """What of `text` may be sent, and whether a stop string ended it. An end that may become one is held back."""
    places = [at for stop in stops if (at := text.find(stop)) >= 0]
    if places:
        return text[: min(places)], True
    kept = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - kept], False


class _Draw(LogitsProcessor):
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.rows.draw(scores)


class _End(StoppingCriteria):
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return self.rows.advance(input_ids)
