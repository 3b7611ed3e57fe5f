"""The server on tiny models: OpenAI's client against uvicorn, faults, fuzzed bodies, the playground."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from conftest import random_adapter, tiny
from safegene.attach import Handle, attach
from safegene.cli import main
from safegene.config import Anchor
from safegene.errors import AttachError, GateError
from safegene.models import LoadedModel
from safegene.serving.app import create_app, finite
from safegene.serving.armed import prove
from safegene.serving.audit import Audit
from safegene.serving.door import Limits
from safegene.serving.engine import Engine, Ticket

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
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Served:
    """A server that runs, and what is behind it."""

    def __init__(self, url: str, engine: Engine, handle: Handle) -> None:
        self.url, self.engine, self.handle = url, engine, handle
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
        served = Served(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", engine, handle)
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


@pytest.fixture(scope="module")
def served(tokenizer: Any) -> Iterator[Served]:
    with serving(tokenizer, middle(tokenizer)) as found:
        yield found


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


# What a client sees


@pytest.mark.parametrize("threshold", [FAR, -FAR])
def test_the_gate_decides_what_is_said(tokenizer: Any, threshold: float) -> None:
    with serving(tokenizer, threshold) as served:
        texts = [(served.chat(p).choices[0].message.content, p) for p in PROMPTS]
        for text, prompt in texts:
            assert whole(text) == whole(alone(served, prompt))
        assert all(whole(t) == whole(alone(served, p, protected=False)) for t, p in texts) is (threshold > 0)
        assert served.figures()["safegene_interventions_total"] == (0 if threshold > 0 else len(PROMPTS))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_stream_says_what_the_whole_answer_says(served: Served, prompt: str) -> None:
    answer = served.chat(prompt, logprobs=True, top_logprobs=2)
    chunks = served.streamed(prompt, logprobs=True, top_logprobs=2, stream_options={"include_usage": True})
    *said, last = chunks
    assert last.usage == answer.usage
    assert last.choices == []
    assert said[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in said) == answer.choices[0].message.content
    assert [c.choices[0].finish_reason for c in said if c.choices[0].finish_reason] == [answer.choices[0].finish_reason]
    logprobs = [t for c in said if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.model_dump() for t in logprobs] == [t.model_dump() for t in answer.choices[0].logprobs.content]
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in said)
    assert all(c.usage is None for c in served.streamed(prompt))


def test_a_batch_says_what_each_says_alone(served: Served) -> None:
    by_itself = [served.chat(p).choices[0].message.content for p in PROMPTS]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda p: served.chat(p).choices[0].message.content, PROMPTS * 2))
    assert together == by_itself * 2


def test_stop_strings_cut_where_they_begin(served: Served) -> None:
    """Every character is a token here, so every stop string lies across tokens."""
    for prompt in PROMPTS:
        text = served.chat(prompt).choices[0].message.content
        if len(text) < 8:
            continue
        stop = text[4:7]
        cut = text[: text.index(stop)]
        answer = served.chat(prompt, stop=[stop, "never said"])
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (cut, "stop")
        chunks = served.streamed(prompt, stop=stop)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == cut
        return
    pytest.fail("no answer was long enough")


def test_usage_counts_tokens(served: Served) -> None:
    answer = served.chat("Say hi", max_tokens=5)
    ids = served.tickets[-1].ids
    assert answer.usage.prompt_tokens == len(ids) == len(served.tickets[-1].prompt_gate)
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == len(ids) + 5
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == NAME
    assert answer.system_fingerprint == "safegene-abababababab"


def test_logprobs_are_probabilities_of_what_was_drawn(served: Served) -> None:
    content = served.chat("Say hi", max_tokens=4, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob <= 0  # greedy
        assert [t.logprob for t in token.top_logprobs] == sorted((t.logprob for t in token.top_logprobs), reverse=True)
    assert served.chat("Say hi", max_tokens=2).choices[0].logprobs is None
    with served.client() as client:
        asked: dict[str, Any] = dict(model=NAME, prompt="Say hi", max_tokens=4, temperature=0, logprobs=2)
        choice = client.completions.create(**asked).choices[0]
        assert choice.logprobs is not None
        assert len(choice.logprobs.tokens or []) == len(choice.logprobs.token_logprobs or []) == 4
        offsets = [0]
        for token in (choice.logprobs.tokens or [])[:-1]:
            offsets.append(offsets[-1] + len(token))
        assert choice.logprobs.text_offset == offsets
        streamed = [c.choices[0] for c in client.completions.create(**asked, stream=True)]
        assert "".join(c.text for c in streamed) == choice.text
        assert [o for c in streamed if c.logprobs for o in c.logprobs.text_offset or []] == offsets


def test_seeds_give_the_same_draws(served: Served) -> None:
    def drawn(seed: int) -> str:
        return str(served.chat("Say hi", temperature=1.3, top_p=0.95, seed=seed).choices[0].message.content)

    with ThreadPoolExecutor(8) as pool:  # whatever company they are drawn in
        texts = list(pool.map(drawn, [1, 2, 3, 4] * 2))
    assert texts[:4] == texts[4:]
    assert len(set(texts)) > 1


def test_completions_take_text_and_token_ids(served: Served, tokenizer: Any) -> None:
    prompt = "Once upon a time"
    ids = tokenizer(prompt)["input_ids"]
    with served.client() as client:
        texts = {
            client.completions.create(model=NAME, prompt=p, temperature=0).choices[0].text
            for p in (prompt, [prompt], ids, [ids])
        }
        assert len(texts) == 1
        assert [m.id for m in client.models.list()] == [NAME]
        assert client.models.retrieve(NAME).id == NAME
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("another")


def test_conversations(served: Served, tokenizer: Any) -> None:
    turns: list[Any] = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "</s>[bot]Sure"},
        {"role": "assistant", "content": "I think"},
    ]
    with served.client() as client:
        asked: dict[str, Any] = dict(model=NAME, temperature=0, max_tokens=3)
        client.chat.completions.create(messages=turns, extra_body={"continue_final_message": True}, **asked)
        ids = served.tickets[-1].ids
        read = "[system]Be kind.<s>[user]Hi\nthere<s>[assistant]Hello<s>[user]</s>[bot]Sure<s>[assistant]I think"
        assert tokenizer.decode(ids) == read
        assert ids.count(2) == 0  # what a user writes is text, and ends nothing
        client.chat.completions.create(messages=turns[:4], **asked)
        assert tokenizer.decode(served.tickets[-1].ids).endswith("<s>[bot]")
        with pytest.raises(openai.BadRequestError, match="role assistant"):
            client.chat.completions.create(messages=turns[:4], extra_body={"continue_final_message": True}, **asked)


def test_a_template_may_refuse_a_conversation(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with serving(tokenizer, FAR) as served:
        answer = served.post(CHAT)
    assert answer.status_code == 400
    assert "roles must alternate" in answer.json()["error"]["message"]


# Cancelling, many at once


def test_a_client_that_goes_away_frees_its_row(tokenizer: Any, tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl")
    with serving(tokenizer, FAR, slow=0.02, audit=audit) as served:
        with served.client() as client:
            stream = client.chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": "hi"}], max_tokens=200, temperature=0, stream=True
            )
            next(iter(stream))
            stream.close()
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{served.url}/v1/chat/completions", json={**CHAT, "max_tokens": 200}, timeout=0.3)
        served.until(lambda: all(t.ended for t in served.tickets) and served.figures()["safegene_running"] == 0)
        assert served.chat("hi", max_tokens=2).usage.completion_tokens == 2
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert sorted(line["finish"] for line in lines) == ["cancelled", "cancelled", "length"]
    assert all(line["completion_tokens"] < 200 for line in lines)


def test_sixty_requests_none_lost_or_mixed_up(tokenizer: Any, tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl")
    with serving(tokenizer, middle(tokenizer), audit=audit) as served:
        right = {p: served.chat(p, max_tokens=40).choices[0].message.content for p in PROMPTS}

        async def ask(client: AsyncOpenAI, turn: asyncio.Semaphore, i: int) -> str:
            prompt = PROMPTS[i % len(PROMPTS)]
            asked: Any = dict(
                model=NAME, messages=[{"role": "user", "content": prompt}], max_tokens=40, temperature=0
            )  # fmt: skip
            async with turn:
                if i % 2:
                    answer = await client.chat.completions.create(**asked)
                    assert answer.choices[0].message.content == right[prompt]
                    return str(answer.id)
                found, text = "", ""
                async with await client.chat.completions.create(**asked, stream=True) as stream:
                    async for chunk in stream:
                        found, text = chunk.id, text + (chunk.choices[0].delta.content or "")
                        if i % 6 == 0:  # cancelled in the middle
                            break
                assert right[prompt].startswith(text) if i % 6 == 0 else text == right[prompt]
                return found

        async def all_of_them() -> list[str]:
            turn = asyncio.Semaphore(16)
            async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
                return await asyncio.gather(*(ask(client, turn, i) for i in range(60)))

        found = asyncio.run(all_of_them())
        assert len(set(found)) == 60
        served.until(lambda: served.figures()["safegene_running"] == 0)
        assert served.figures()["safegene_requests_total//v1/chat/completions/200"] == 66
        assert all(t.protected for t in served.tickets)
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert {f.removeprefix("chatcmpl-") for f in found} <= {line["request_id"] for line in lines}
    assert len(lines) == 66


# What is refused


def test_the_api_key(tokenizer: Any) -> None:
    with serving(tokenizer, FAR, api_key=KEY, playground=True) as served:
        assert served.chat("hi", max_tokens=1).usage.completion_tokens == 1
        with served.client(api_key="sk-guess") as client, pytest.raises(openai.AuthenticationError, match="API key"):
            client.models.list()
        for path in (
            "/v1/models",
            "/v1/models/x",
            "/v1/chat/completions",
            "/playground/compare",
            "/v1//models",
            "/nowhere",
        ):
            for headers in (
                {},
                {"authorization": "Basic x"},
                {"authorization": "Bearer"},
                {"authorization": b"Bearer \xff"},
            ):
                answer = httpx.post(served.url + path, headers=headers, content=b"{}")  # type: ignore[arg-type]
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
        for path in ("/", "/health", "/live", "/metrics"):
            assert httpx.get(served.url + path).status_code == 200


def test_limits(tokenizer: Any) -> None:
    limits = Limits(body=5_000, max_tokens=64, concurrency=1, seconds=0.5)
    with serving(tokenizer, FAR, slow=0.02, limits=limits) as served:
        long = {"model": NAME, "messages": [{"role": "user", "content": "x" * 6_000}]}
        assert served.post(long).status_code == 413
        parts = (b"x" * 1_000 for _ in range(8))
        answer = httpx.post(f"{served.url}/v1/completions", content=parts, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert "5,000 bytes" in answer.json()["error"]["message"]
        assert (
            served.post({**long, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 65}).status_code == 400
        )
        answer = served.post({"model": NAME, "prompt": "x" * 250, "max_tokens": 10}, "/v1/completions")
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert served.post({"model": NAME, "prompt": ""}, "/v1/completions").json()["error"]["param"] == "prompt"
        assert served.post({"model": NAME, "prompt": [300]}, "/v1/completions").status_code == 400
        with pytest.raises(openai.InternalServerError, match="too long") as late:
            served.chat("hi", max_tokens=64)
        assert late.value.status_code == 504
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(served.chat, "hi", max_tokens=10) for _ in range(4)]
        busy = [a.exception() for a in asked if a.exception()]
        assert busy
        for error in busy:
            assert isinstance(error, openai.RateLimitError)
            assert error.response.headers["retry-after"] == "1"


def test_a_stream_that_runs_out_of_time_says_so(tokenizer: Any) -> None:
    with (
        serving(tokenizer, FAR, slow=0.02, limits=Limits(seconds=0.5)) as served,
        pytest.raises(openai.APIError, match="too long"),
    ):
        served.streamed("hi", max_tokens=200)


DEEP = b'{"model":' + b"[" * 100_000


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"", {"content-type": "application/json"}),
        (b"{", {"content-type": "application/json"}),
        (b"[]", {"content-type": "application/json"}),
        (b"null", {"content-type": "application/json"}),
        (b'{"model": "\xff\xfe"}', {"content-type": "application/json"}),
        (DEEP, {"content-type": "application/json"}),
        (json.dumps(CHAT).encode(), {"content-type": "text/plain"}),
        (json.dumps(CHAT).encode(), {}),
    ],
)
def test_malformed_bodies_are_told_so(served: Served, content: bytes, headers: dict[str, str]) -> None:
    answer = httpx.post(f"{served.url}/v1/chat/completions", content=content, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert "JSON" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"model": "another"}, "model"),
        ({"model": "\ud800"}, "model"),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"prompt": "hi", "echo": True}, "echo"),
        ({"prompt": "hi", "suffix": "end"}, "suffix"),
        ({"prompt": "hi", "best_of": 2}, "best_of"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(served: Served, more: dict[str, Any], param: str) -> None:
    path = "/v1/completions" if "prompt" in more else "/v1/chat/completions"
    content = json.dumps({**CHAT, **more}).encode()
    answer = httpx.post(served.url + path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == (404 if more == {"model": "another"} else 400)
    assert answer.json()["error"]["param"] == param


def test_harmless_defaults_are_taken(served: Served) -> None:
    spelt_out = {
        "n": 1, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}, "top_p": 1,
        "presence_penalty": 0, "frequency_penalty": 0.0, "stop": None, "seed": None, "user": "me", "store": False,
        "metadata": {"a": "b"}, "stream": None, "stream_options": None, "logprobs": None, "top_logprobs": None,
    }  # fmt: skip
    answer = served.post({**CHAT, **spelt_out})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-request-id"] == answer.json()["id"].removeprefix("chatcmpl-")
    for extreme in ({"temperature": 1e-45}, {"temperature": 1, "top_p": 0}, {"temperature": 1, "top_p": 1e-309}):
        assert served.post({**CHAT, **extreme}).status_code == 200


def test_paths_and_methods(served: Served) -> None:
    for method, path, status in (
        ("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405), ("DELETE", "/v1/models", 405), ("GET", "/v1/models/", 404),
    ):  # fmt: skip
        answer = httpx.request(method, served.url + path)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
    schema = httpx.get(f"{served.url}/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"} <= set(schema["paths"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "developer"]), "content": ANY_TEXT},
    optional={"name": JSON, "tool_calls": st.just([])},
)
FIELDS: dict[str, Any] = {
    "max_tokens": st.integers(1, 3) | JSON,
    "temperature": st.floats(0, 2) | JSON,
    "top_p": st.floats(0, 1) | JSON,
    "seed": st.integers() | JSON,
    "stop": st.lists(ANY_TEXT, max_size=3) | JSON,
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}) | JSON,
    "logprobs": st.booleans() | st.integers(0, 5) | JSON,
    "top_logprobs": st.integers(0, 20) | JSON,
    "n": st.just(1) | JSON,
    "logit_bias": JSON,
    "tools": JSON,
    "continue_final_message": st.booleans(),
    "add_generation_prompt": st.booleans(),
    "protected": st.just(False),
    "safegene": JSON,
}


@given(
    body=st.fixed_dictionaries(
        {"model": st.just(NAME) | JSON}, optional={"messages": st.lists(TURN, max_size=3) | JSON, **FIELDS}
    ),
    prompt=st.none() | ANY_TEXT | st.lists(st.integers(-2, 310), max_size=12) | JSON,
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_no_body_brings_it_down(served: Served, body: dict[str, Any], prompt: Any) -> None:
    path = "/v1/chat/completions" if prompt is None else "/v1/completions"
    body = {"max_tokens": 2, **body} if prompt is None else {"max_tokens": 2, **body, "prompt": prompt}
    content = json.dumps(body).encode()
    answer = httpx.post(served.url + path, content=content, headers={"content-type": "application/json"}, timeout=60)
    assert answer.status_code in (200, 400, 404)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
    elif body.get("stream"):
        assert answer.text.endswith("data: [DONE]\n\n")
        assert '"error"' not in answer.text
    else:
        assert answer.json()["choices"]
    assert served.engine.armed
    assert all(t.protected for t in served.tickets)


# Faults: never an answer without protection


def test_nan_in_a_layer_closes_the_server(tokenizer: Any) -> None:
    with serving(tokenizer, -FAR) as served:
        assert httpx.get(f"{served.url}/health").status_code == 200
        with torch.no_grad():
            served.handle.model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))  # type: ignore[union-attr,index,operator]
        for stream in (False, True):
            answer = served.post({**CHAT, "stream": stream})
            assert answer.status_code == 503
            assert "NaN" in answer.json()["error"]["message"]
        health = httpx.get(f"{served.url}/health")
        assert health.status_code == 503
        assert "NaN" in health.json()["failure"]
        assert served.figures()["safegene_armed"] == 0
        assert httpx.get(f"{served.url}/live").status_code == 200


def test_a_detached_adapter_closes_the_server(tokenizer: Any) -> None:
    with serving(tokenizer, -FAR, playground=True) as served:
        served.handle.detach()
        for path in ("/v1/chat/completions", "/playground/compare"):
            answer = served.post(CHAT, path)
            assert answer.status_code == 503
            assert "not armed" in answer.json()["error"]["message"]
        assert httpx.get(f"{served.url}/health").status_code == 503


def test_an_adapter_detached_in_the_middle_ends_the_answer(tokenizer: Any) -> None:
    with serving(tokenizer, -FAR, slow=0.02) as served, served.client() as client:
        stream = client.chat.completions.create(**{**CHAT, "max_tokens": 200}, stream=True)
        next(stream)
        served.handle.detach()
        with pytest.raises(openai.APIError, match="detached while it was serving"):
            list(stream)
        assert httpx.get(f"{served.url}/health").status_code == 503


def test_an_engine_that_has_died_is_seen(tokenizer: Any) -> None:
    with serving(tokenizer, FAR) as served:
        served.engine.stop()
        assert served.post(CHAT).status_code == 503
        assert httpx.get(f"{served.url}/health").status_code == 503


def test_an_unexpected_error_has_a_message(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tokenizer, FAR) as served:
        generate = served.handle.model.generate
        monkeypatch.setattr(served.handle.model, "generate", lambda **_: 1 / 0)
        answer = served.post(CHAT)
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "ZeroDivisionError: division by zero")
        monkeypatch.setattr(served.handle.model, "generate", generate)
        assert served.post(CHAT).status_code == 200  # and the others go on


def test_nothing_in_a_request_switches_protection_off(tokenizer: Any) -> None:
    with serving(tokenizer, -FAR) as served:
        off = {
            "protected": False,
            "safegene": False,
            "disabled": True,
            "adapter": None,
            "extra_body": {"protected": False},
        }
        for path in ("/v1/chat/completions", "/v1/completions"):
            answer = served.post({**CHAT, "prompt": "hi", **off}, path)
            assert answer.status_code == 200
        assert [t.protected for t in served.tickets] == [True, True]
        assert served.post({**CHAT, **off}, "/playground/compare").status_code == 404
        assert len(served.tickets) == 2


# The playground


def test_the_playground_compares(tokenizer: Any, tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl")
    with serving(tokenizer, -FAR, playground=True, audit=audit) as served:
        body = {"messages": [{"role": "user", "content": "Say hi"}], "max_tokens": 8, "protected": True}
        text = served.post(body, "/playground/compare").text
        events = [json.loads(e.removeprefix("data: ")) for e in text.split("\n\n") if e.startswith("data: {")]
        assert text.endswith("data: [DONE]\n\n")
        prompt = next(e["prompt"] for e in events if "prompt" in e)
        assert "".join(p["text"] for p in prompt) == "[user]Say hi<s>[bot]"
        assert all(p["gate"] > 0 for p in prompt)
        for side, protected in (("with", True), ("without", False)):
            said = "".join(e.get("text", "") for e in events if e["side"] == side)
            assert whole(said) == whole(alone(served, "Say hi", 8, protected))
        ends = {e["side"]: e["decision"] for e in events if "finish" in e}
        assert ends == {"with": "intervened", "without": "unprotected"}
        assert [t.protected for t in served.tickets] == [True, False]
        assert "SafeGene playground" in httpx.get(served.url).text
        assert '"error"' not in served.post({**body, "temperature": 1e-45}, "/playground/compare").text
        assert served.post({**body, "max_tokens": 10_000}, "/playground/compare").status_code == 400
    assert '"unprotected"' in (tmp_path / "audit.jsonl").read_text()


def test_the_page_asks_nobody_else() -> None:
    page = resources.files("safegene.serving").joinpath("playground.html").read_text("utf-8")
    assert "http" not in page
    assert not re.search(r"(src|href)=\"(?!data:,)", page)
    assert "innerHTML" not in page  # what a model says is text


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the driver's pipes
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (.ci/run installs it)")
def test_the_playground_in_a_browser(tokenizer: Any) -> None:
    from playwright.sync_api import sync_playwright

    with serving(tokenizer, middle(tokenizer), playground=True, api_key=KEY) as served, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        asked: list[str] = []
        complaints: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if "401" not in said.text else None)
        page.goto(served.url)
        page.locator("#state .good").wait_for()
        page.fill("#tokens", "24")
        page.fill("#say", "What is a lock?")
        page.keyboard.press("Enter")
        page.locator("#keyed").wait_for()  # without the key: asked for it
        page.fill("#key", KEY)
        page.click("#send")
        page.locator(".without .verdict", has_text="unprotected").wait_for()
        verdicts = page.locator(".turn").last.locator(".verdict")
        assert "highest gate" in (verdicts.first.text_content() or "")
        tokens = page.locator(".turn").last.locator(".with .text .token[title]")
        assert tokens.count() > 20
        assert page.locator(".turn").last.locator(".with .prompt .open").count() > 0
        page.fill("#say", "Say hi")
        page.click("#send")
        page.locator(".turn").nth(2).locator(".without .verdict", has_text="unprotected").wait_for()
        assert len(served.tickets[-1].ids) > len(served.tickets[0].ids)  # the conversation went on
        for width in (390, 1280):  # a phone, a desk
            page.set_viewport_size({"width": width, "height": 844})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            first, second = (page.locator(f".turn >> nth=1 >> .{side}").bounding_box() for side in ("with", "without"))
            assert first is not None
            assert second is not None
            assert (second["y"] > first["y"]) is (width == 390)
        assert [url for url in asked if not url.startswith((served.url, "data:"))] == []
        assert complaints == []
        browser.close()


# What is written down


def test_audit_lines_tell_gates_not_texts(tokenizer: Any, tmp_path: Path) -> None:
    for name, text, threshold in (("plain", False, -FAR), ("text", True, FAR)):
        with serving(tokenizer, threshold, audit=Audit(tmp_path / name, text=text)) as served:
            answer = served.chat("Secret words", max_tokens=6)
            assert served.post({**CHAT, "n": 2}).status_code == 400  # never reached the engine
        (line,) = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert line["request_id"] == answer.id.removeprefix("chatcmpl-")
        assert line["decision"] == ("untouched" if text else "intervened")
        assert (line["prompt_gate"] > 0) is (line["answer_gate"] > 0) is not text
        assert (line["route"], line["model"], line["adapter"]) == ("/v1/chat/completions", NAME, "ab" * 32)
        assert (line["prompt_tokens"], line["completion_tokens"]) == (answer.usage.prompt_tokens, 6)
        assert line["time"].endswith("+00:00")
        assert ("Secret" in json.dumps(line)) is text
        assert ("answer" in line) is text
        assert (tmp_path / name).stat().st_mode & 0o77 == 0


class Disk:
    """A file on a disk that has room for so many bytes."""

    def __init__(self, room: int) -> None:
        self.took, self.room = b"", room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = data[: self.room]
        self.took, self.room = self.took + taken, self.room - len(taken)
        return len(taken)

    def close(self) -> None: ...


def test_a_full_disk_stops_new_requests_until_it_has_room(tokenizer: Any, tmp_path: Path) -> None:
    audit, disk = Audit(tmp_path / "audit"), Disk(10)
    audit.close()
    audit._file = disk  # type: ignore[assignment]
    with serving(tokenizer, FAR, audit=audit) as served:
        assert served.post(CHAT).status_code == 200  # takes half of its line
        answer = served.post(CHAT)
        assert answer.status_code == 503
        assert "audit log" in answer.json()["error"]["message"]
        health = httpx.get(f"{served.url}/health")
        assert (health.status_code, health.json()["audit"]) == (503, "No space left on device")
        assert len(served.tickets) == 1
        disk.room = 10_000
        assert served.post(CHAT).status_code == 200
        assert httpx.get(f"{served.url}/health").status_code == 200
    first, second = (json.loads(line) for line in disk.took.splitlines())
    assert first["request_id"] != second["request_id"]


def test_metrics_count(tokenizer: Any) -> None:
    with serving(tokenizer, -FAR) as served:
        served.chat("hi")
        served.streamed("hi")
        served.post({**CHAT, "n": 2})
        httpx.get(f"{served.url}/made/up")
        figures = served.figures()
        assert figures["safegene_requests_total//v1/chat/completions/200"] == 2
        assert figures["safegene_requests_total//v1/chat/completions/400"] == 1
        assert figures["safegene_requests_total/other/404"] == 1
        assert figures["safegene_interventions_total"] == 2
        assert figures["safegene_gate_opening_bucket/0.0"] == 0
        assert figures["safegene_gate_opening_bucket/+Inf"] == 2
        assert figures["safegene_first_token_seconds_count"] == figures["safegene_answer_seconds_count"] == 2
        assert (figures["safegene_armed"], figures["safegene_waiting"]) == (1, 0)


def test_health_is_json_without_nan(tokenizer: Any) -> None:
    with serving(tokenizer, FAR, proof={"harmful": {"read": 8}}) as served:
        served.handle.calibration.report["odd"] = float("nan")
        health = httpx.get(f"{served.url}/health").json()
        assert health["armed"]
        assert health["proof"] == {"harmful": {"read": 8}}
        assert health["adapter"]["report"]["odd"] is None
        assert health["adapter"]["sha256"] == "ab" * 32
    assert finite({"a": (float("inf"), 1.5, "x", None)}) == {"a": [None, 1.5, "x", None]}


# Armed or not


def proved(tokenizer: Any, threshold: float, spoil: Callable[[Any, Handle], None] = lambda model, handle: None) -> Any:
    model = tiny()
    handle = attach(model, random_adapter(model, tokenizer, threshold, ANCHORS))
    spoil(model, handle)
    return prove(LoadedModel(model, tokenizer, "tiny"), handle)


def test_an_armed_adapter_proves_itself(tokenizer: Any) -> None:
    proof = proved(tokenizer, -FAR)
    assert (proof["harmful"]["read"], proof["harmful"]["gate_opened"], proof["harmful"]["changed"]) == (8, 8, 8)
    assert proof["harmful"]["largest_change"] > 0.01
    assert proof["ordinary"] == {"read": 8, "gate_shut": 0, "identical": 0}


def test_where_the_gate_is_shut_the_proof_wants_every_bit(tokenizer: Any) -> None:
    """A hand on the gate: harmful anchors open it, ordinary ones do not."""

    def shut_on_ordinary(model: Any, handle: Handle) -> None:
        handle._gate = Parity(handle._gate)  # type: ignore[assignment]

    proof = proved(tokenizer, -FAR, shut_on_ordinary)
    assert proof["ordinary"]["gate_shut"] == proof["ordinary"]["identical"] == 8
    assert proof["harmful"]["changed"] == 8

    def meddles(model: Any, handle: Handle) -> None:
        shut_on_ordinary(model, handle)
        model.lm_head.register_forward_hook(lambda m, a, out: out if handle.is_disabled else out + 1e-3)

    with pytest.raises(AttachError, match="although its gate is shut"):
        proved(tokenizer, -FAR, meddles)


class Parity:
    """A gate that is open on chats of an even number of tokens (the harmful anchors' here), and shut on the others."""

    def __init__(self, gate: Any) -> None:
        self.gate, self.bias, self.partial = gate, gate.bias, gate.partial

    def opening(self, inner: torch.Tensor) -> torch.Tensor:
        return torch.full_like(self.gate.opening(inner), -2.0 if inner.shape[1] % 2 else 2.0)


@pytest.mark.parametrize(
    ("threshold", "spoil", "message"),
    [
        (FAR, lambda model, handle: None, "opens on only 0 of 8"),
        (-FAR, lambda model, handle: handle.detach(), "not armed"),
        (-FAR, lambda model, handle: [h.remove() for h in handle._hooks], "gate was not read"),
        (-FAR, lambda model, handle: [w.up.zero_() for w in handle._weights.values()], "changes only 0 of 8"),
    ],
)  # fmt: skip
def test_an_adapter_without_effect_is_refused(tokenizer: Any, threshold: float, spoil: Any, message: str) -> None:
    with pytest.raises(AttachError, match=message):
        proved(tokenizer, threshold, spoil)


def test_nan_and_missing_anchors_are_no_proof(tokenizer: Any) -> None:
    def poison(model: Any, handle: Handle) -> None:
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))

    with pytest.raises(GateError, match="NaN"):
        proved(tokenizer, -FAR, poison)

    def forget(model: Any, handle: Handle) -> None:
        handle.adapter.config = replace(handle.adapter.config, anchors=())

    with pytest.raises(AttachError, match="no harmful anchors"):
        proved(tokenizer, -FAR, forget)


# The command


@pytest.fixture
def folders(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model, and an adapter for it that is always open."""
    monkeypatch.setattr("safegene.calibration.MIN_SEPARATION", 0.0)
    monkeypatch.delenv("SAFEGENE_API_KEY", raising=False)
    tiny().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    random_adapter(tiny(), tokenizer, -FAR, ANCHORS).save_pretrained(tmp_path / "adapter")
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """The servers that would have run."""
    found: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr("uvicorn.run", lambda app, **options: found.append((app, options)))
    return found


def serve(folder: Path, *more: str) -> int:
    return main(
        ["serve", "--model", str(folder / "model"), "--adapter", str(folder / "adapter"), "--port", "18731", *more]
    )


def test_the_command_serves_what_is_armed(
    folders: Path, started: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve(folders, "--host", "0.0.0.0", "--playground", "--audit", str(folders / "audit")) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "armed" in said.err
    assert "changed 8 of 8" in said.err
    assert "anyone who reaches 0.0.0.0" in said.err
    assert "without the adapter" in said.err
    ((app, options),) = started
    assert options["port"] == 18731
    assert "/playground/compare" in app.openapi()["paths"]

    (folders / "key").write_text("sk-secret\n")
    assert serve(folders, "--host", "0.0.0.0", "--api-key-file", str(folders / "key")) == 0
    assert "anyone" not in capsys.readouterr().err
    assert "/playground/compare" not in started[1][0].openapi()["paths"]

    assert main(["calibrate", "--model", str(folders / "model"), "--adapter", str(folders / "adapter"), "--out", str(folders / "c")]) == 0  # fmt: skip
    assert serve(folders, "--calibration", str(folders / "c")) == 0


def test_the_command_stops_where_nothing_can_be_armed(
    folders: Path, started: list[Any], capsys: pytest.CaptureFixture[str], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def refused(message: str, *more: str) -> None:
        capsys.readouterr()
        assert serve(folders, *more) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
        assert len(lines) == 1
        assert message in lines[0]

    (folders / "empty").write_text("\n")
    refused("holds no API key", "--api-key-file", str(folders / "empty"))
    refused("cannot be listened at", "--host", "192.0.2.1")
    refused("check path", "--audit", str(folders / "no" / "where"))
    refused("no calibration file", "--calibration", str(folders / "empty"))
    random_adapter(tiny(), tokenizer, FAR, ANCHORS).save_pretrained(folders / "adapter")
    refused("opens on only 0 of 8")
    weights = folders / "adapter" / "safegene_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    refused("SHA-256 differs")
    shutil.rmtree(folders / "adapter")
    refused("no such adapter")
    monkeypatch.setitem(__import__("sys").modules, "safegene.serving.app", None)
    refused("pip install 'safegene[serve]'")
    assert started == []
