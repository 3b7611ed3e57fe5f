"""What the server refuses: keys, limits, malformed bodies. Fuzzed ones: test_serving_fuzzed.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from safegene.serving.door import Limits
from served import CHAT, FAR, KEY, NAME, Served, middle, serving


@pytest.fixture(scope="module")
def served(tokenizer: Any) -> Iterator[Served]:
    with serving(tokenizer, middle(tokenizer)) as found:
        yield found


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
        assert httpx.options(f"{served.url}/v1/models").status_code == 405  # a preflight; nothing is behind it


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
        errors = [a.exception() for a in asked]
        # The one that is let in may take too long on a machine that is busy with something else.
        busy = [error for error in errors if isinstance(error, openai.RateLimitError)]
        assert busy
        assert all(error.response.headers["retry-after"] == "1" for error in busy)


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
