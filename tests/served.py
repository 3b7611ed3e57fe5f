"""A server on a tiny model for the tests: OpenAI's client against uvicorn in a thread."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import torch
import uvicorn
from fastapi import FastAPI
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from conftest import random_adapter, tiny
from safegene.attach import Handle, attach
from safegene.config import Anchor
from safegene.models import LoadedModel
from safegene.serving.app import create_app
from safegene.serving.audit import Audit
from safegene.serving.door import Limits
from safegene.serving.engine import Engine, Ticket

FUZZED = int(os.environ.get("SAFEGENE_FUZZED", "300"))
"""Examples of each fuzzing test; `make fuzz-serving` takes 10,000."""
FAR = 1e6
NAME = "org/tiny"
KEY = "sk-test"
PROMPTS = ("What is a lock?", "Say hi", "How are you today, friend?", "Count", "A b c d e f g", "Where is Rome?")
ANCHORS = tuple(
    Anchor(f"{label} {word}", label)  # type: ignore[arg-type]
    for label in ("harmful", "ordinary")
    for word in ("fish", "tree", "door", "sand", "lamp", "road", "rain", "bird", "ship")
)
CHAT: dict[str, Any] = {
    "model": NAME,
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 2,
    "temperature": 0,
}


class Served:
    """A server that runs, and what is behind it."""

    def __init__(self, url: str, app: FastAPI, engine: Engine, handle: Handle) -> None:
        self.url, self.app, self.engine, self.handle = url, app, engine, handle
        self.tickets: list[Ticket] = []

    def client(self, **more: Any) -> OpenAI:
        return OpenAI(**{"base_url": f"{self.url}/v1", "api_key": KEY, "max_retries": 0, "timeout": 60, **more})

    def post(self, body: Any, path: str = "/v1/chat/completions") -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60)

    def chat(self, prompt: str, **more: Any) -> Any:
        asked = {"max_tokens": 24, "temperature": 0, **more}
        with self.client() as client:
            return client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": prompt}], **asked)

    def streamed(self, prompt: str, **more: Any) -> list[Any]:
        asked = {"max_tokens": 24, "temperature": 0, **more}
        with self.client() as client:
            message = {"role": "user", "content": prompt}
            return list(client.chat.completions.create(model=NAME, messages=[message], stream=True, **asked))

    def figures(self) -> dict[str, float]:
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text)
        return {s.name + "".join(f"/{v}" for v in s.labels.values()): s.value for f in families for s in f.samples}

    def until(self, found: Callable[[], bool]) -> None:
        end = time.monotonic() + 20
        while not found():
            assert time.monotonic() < end
            time.sleep(0.02)


@contextlib.contextmanager
def serving(
    tokenizer: Any, threshold: float = 0.0, *, slow: float = 0.0, max_batch: int = 16, audit: Audit | None = None, **options: Any
) -> Iterator[Served]:  # fmt: skip
    """A tiny model with a random adapter behind uvicorn in a thread. `slow`: seconds that every pass takes at least."""
    model = tiny()
    handle = attach(model, random_adapter(model, tokenizer, threshold, ANCHORS))
    if slow:
        model.register_forward_pre_hook(lambda *_: time.sleep(slow))
    engine = Engine(LoadedModel(model, tokenizer, "tiny"), handle, max_batch=max_batch)
    app = create_app(
        engine, **{"model_name": NAME, "adapter_digest": "ab" * 32, "limits": Limits(), "proof": {}, "audit": audit, **options}
    )  # fmt: skip
    engine.start()
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        served = Served(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", app, engine, handle)
        submit = engine.submit

        def noted(ticket: Ticket) -> None:
            served.tickets.append(ticket)
            submit(ticket)

        engine.submit = noted  # type: ignore[method-assign]
        yield served
    finally:
        server.should_exit = True
        thread.join(30)
        engine.stop()
    assert not thread.is_alive()


def middle(tokenizer: Any) -> float:
    """The threshold that half of a few positions pass: the gate opens here and there."""
    model = tiny()
    handle = attach(model, random_adapter(model, tokenizer))
    with handle.recording() as record, torch.no_grad():
        for prompt in PROMPTS:
            model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]]))
    return float(torch.cat([r.flatten() for r in record]).median())


def alone(served: Served, prompt: str, tokens: int = 24, protected: bool = True) -> str:
    """What transformers' own `generate` says."""
    model, tokenizer = served.handle.model, served.engine.loaded.tokenizer
    chat = [{"role": "user", "content": prompt}]
    ids = torch.tensor([tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)])
    with contextlib.nullcontext() if protected else served.handle.disabled():
        out: Any = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def whole(text: str) -> str:
    """Without the part of a character that may stand at the end, which only a whole decoding shows."""
    return text.rstrip("�")
