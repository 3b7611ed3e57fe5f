"""`safegene serve --engine vllm`, asked by the official client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from harness import Served, compare, of, serving

KEY = "sk-test"
HEADERS = {"authorization": f"Bearer {KEY}"}
REQUESTS, APART = 64, 0.1
"""Streaming requests, and seconds between their arrivals."""
SECRET = "Name a colour."
LONG = {"prompt": "Count:", "max_tokens": 900, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "audit.jsonl"


@pytest.fixture(scope="module")
def served(reference: dict[str, Any], log: Path) -> Iterator[Served]:
    with serving(reference, own=["--audit", str(log)], key=KEY) as found:
        yield found


async def streamed(client: openai.AsyncOpenAI, model: str, prompt: list[int], after: float, **more: Any) -> list[int]:
    """The token ids of one streamed completion."""
    await asyncio.sleep(after)
    stream = await client.completions.create(
        model=model, prompt=prompt, temperature=0, max_tokens=40, stream=True, extra_body={"return_token_ids": True, **more}
    )  # fmt: skip
    ids: list[int] = []
    async for chunk in stream:
        for choice in chunk.choices:
            ids += getattr(choice, "token_ids", None) or []
    return ids


def ask_all(served: Served, reference: dict[str, Any], prompts: list[dict[str, Any]], **more: Any) -> list[list[int]]:
    async def go() -> list[list[int]]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY, timeout=300, max_retries=0) as client:
            asked = (
                streamed(client, reference["model"], p["prompt"], APART * i, **more) for i, p in enumerate(prompts)
            )
            return await asyncio.gather(*asked)

    return asyncio.run(go())


def test_it_says_what_is_armed(served: Served, reference: dict[str, Any], figures: dict[str, Any]) -> None:
    health = httpx.get(f"{served.url}/health").json()
    assert health["armed"]
    assert health["adapter"]["calibrated"]
    assert health["proof"]["harmful"]["changed"] > 4
    assert health["proof"]["ordinary"]["unchanged"] > 4
    assert httpx.get(f"{served.url}/live").json() == {"alive": True}
    assert "safegene_armed 1.0" in httpx.get(f"{served.url}/metrics").text
    assert sum("safegene: armed" in line for line in served.said) == 1
    figures["proof"] = health["proof"]


def test_streams_that_come_one_after_the_other(
    served: Served, reference: dict[str, Any], figures: dict[str, Any]
) -> None:
    prompts = of(reference, "harmful", "benign", "middle")[-REQUESTS:]
    assert len(prompts) == REQUESTS
    differing = compare(prompts, ask_all(served, reference, prompts))
    figures["server"] = {"requests": REQUESTS, "equal": REQUESTS - len(differing), "differing": differing}
    assert differing == []


def test_no_field_of_a_request_switches_it_off(served: Served, reference: dict[str, Any]) -> None:
    prompts = of(reference, "harmful")[:4]
    fields = {
        "vllm_xargs": {"safegene": 0, "disable": 1}, "safegene": False, "adapter": None, "extra_args": {"safegene": False},
    }  # fmt: skip
    assert compare(prompts, ask_all(served, reference, prompts, **fields)) == []
    for path in ("/collective_rpc", "/sleep", "/update_weights", "/v1/load_lora_adapter", "/reset_prefix_cache"):
        assert httpx.post(served.url + path, json={}, headers=HEADERS).status_code == 404


def test_it_wants_its_key(served: Served, reference: dict[str, Any]) -> None:
    other = openai.OpenAI(base_url=f"{served.url}/v1", api_key="sk-other", max_retries=0)
    with other, pytest.raises(openai.AuthenticationError):
        other.models.list()
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY) as client:
        assert [m.id for m in client.models.list()] == [reference["model"]]
        said = client.chat.completions.create(
            model=reference["model"], messages=[{"role": "user", "content": SECRET}], max_tokens=8
        )
        assert said.choices[0].message.content
    for path in ("/invocations", "/tokenize", "/v1/responses"):  # vLLM's own check guards /v1 only
        answer = httpx.post(served.url + path, json={"model": reference["model"], "prompt": "Hello"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def still_answers(served: Served, reference: dict[str, Any]) -> None:
    """Ordinary requests, after whatever was asked before."""
    prompts = of(reference, "benign")[:2]
    assert compare(prompts, ask_all(served, reference, prompts)) == []


def test_bodies_that_are_too_large_or_malformed_are_told_so(served: Served, reference: dict[str, Any]) -> None:
    model = {"model": reference["model"], "max_tokens": 4}
    for chunks in (False, True):
        large = json.dumps({**model, "prompt": "x" * (1 << 20)}).encode()
        content: Any = (large[i : i + 65536] for i in range(0, len(large), 65536)) if chunks else large
        answer = httpx.post(f"{served.url}/v1/completions", content=content, headers={**HEADERS, "content-type": "application/json"})  # fmt: skip
        assert (answer.status_code, "larger than" in answer.json()["error"]["message"]) == (413, True)
    for content in (b"", b"{", b"[]", b"null", b'{"model": "\xff\xfe"}', b'{"model":' + b"[" * 100_000):
        answer = httpx.post(f"{served.url}/v1/completions", content=content, headers={**HEADERS, "content-type": "application/json"})  # fmt: skip
        assert (400 <= answer.status_code < 500, bool(answer.json()["error"]["message"])) == (True, True), content[:20]
    for spoilt in (
        {"prompt": [-1]}, {"prompt": [10**9]}, {"prompt": {"a": 1}}, {"prompt": "Hello", "max_tokens": -1}, {"prompt": "Hello", "logprobs": 10**6},
        {"prompt": "Hello", "temperature": -1}, {"prompt": "x " * 5000}, {"prompt": "Hello", "stop": {"a": 1}},
    ):  # fmt: skip
        answer = httpx.post(f"{served.url}/v1/completions", json={**model, **spoilt}, headers=HEADERS)
        assert (400 <= answer.status_code < 500, bool(answer.json()["error"]["message"])) == (True, True), spoilt
    chat = {**model, "messages": [{"role": "user", "content": "Hello"}], "chat_template": "{{ messages[0].content }}"}
    assert httpx.post(f"{served.url}/v1/chat/completions", json=chat, headers=HEADERS).status_code == 400
    still_answers(served, reference)


def test_a_client_that_goes_away_frees_its_row(served: Served, reference: dict[str, Any]) -> None:
    before = served.figure("vllm:generation_tokens_total")
    long = {**LONG, "model": reference["model"]}
    with httpx.stream("POST", f"{served.url}/v1/completions", json={**long, "stream": True}, headers=HEADERS, timeout=60) as stream:  # fmt: skip
        next(stream.iter_lines())
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{served.url}/v1/completions", json=long, headers=HEADERS, timeout=1)
    served.wait_for(lambda: served.figure("vllm:num_requests_running") == 0, 60)
    assert served.figure("vllm:generation_tokens_total") - before < 900  # of 1,800
    still_answers(served, reference)


def test_the_audit_log_tells_requests_not_texts(served: Served, reference: dict[str, Any], log: Path) -> None:
    body = {"model": reference["model"], "prompt": SECRET, "max_tokens": 1}
    asked = httpx.post(f"{served.url}/v1/completions", json=body, headers=HEADERS, timeout=60)
    httpx.post(f"{served.url}/v1/completions", json=body)
    httpx.get(f"{served.url}/{SECRET}", headers=HEADERS)
    written = log.read_text()
    lines = [json.loads(line) for line in written.splitlines()]
    assert [(line["route"], line["status"]) for line in lines[-3:]] == [("/v1/completions", 200), ("/v1/completions", 401), ("other", 404)]  # fmt: skip
    assert {"time", "request_id", "route", "model", "adapter", "status", "seconds"} == set(lines[-3])
    assert len({line["request_id"] for line in lines}) == len(lines)
    assert lines[-3]["request_id"] == asked.headers["x-request-id"]
    assert lines[-3]["request_id"] in asked.json()["id"]
    assert lines[-3]["adapter"] == httpx.get(f"{served.url}/health").json()["adapter"]["sha256"]
    assert SECRET not in written
    assert log.stat().st_mode & 0o77 == 0
    assert served.figure("safegene_requests_total") >= len(lines)


def test_an_answer_that_takes_too_long_is_cut_off_and_a_signal_ends_it_well(reference: dict[str, Any]) -> None:
    with serving(reference, "--enforce-eager", own=["--timeout", "2"]) as served:
        long = {**LONG, "model": reference["model"]}
        late = httpx.post(f"{served.url}/v1/completions", json=long, timeout=60)
        assert (late.status_code, "longer than 2 seconds" in late.json()["error"]["message"]) == (504, True)
        stream = httpx.post(f"{served.url}/v1/completions", json={**long, "stream": True}, timeout=60).text
        *said, error, done = stream.strip().split("\n\n")
        assert said
        assert "longer than 2 seconds" in json.loads(error.removeprefix("data: "))["error"]["message"]
        assert done == "data: [DONE]"
        served.wait_for(lambda: served.figure("vllm:num_requests_running") == 0, 30)
        assert httpx.post(f"{served.url}/v1/completions", json={**long, "max_tokens": 2}, timeout=60).status_code == 200
        served.process.send_signal(signal.SIGTERM)
        served.wait_for(served.ended, 90)
        assert served.process.returncode == 0


def test_a_killed_worker_ends_it(reference: dict[str, Any], figures: dict[str, Any]) -> None:
    """No answer comes from what is left; the command says so in one line."""
    with serving(reference, "--enforce-eager") as served:
        body = {"model": reference["model"], "prompt": "Hello", "max_tokens": 4}
        assert httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).status_code == 200
        found = re.search(r"EngineCore[^)]*pid=(\d+)", "".join(served.said))
        assert found
        os.kill(int(found[1]), signal.SIGKILL)
        outcomes = []
        while not served.ended():
            with contextlib.suppress(httpx.TransportError):
                outcomes.append(httpx.post(f"{served.url}/v1/completions", json=body, timeout=30).status_code)
        served.wait_for(served.ended, 60)
        figures["killed_worker"] = {"statuses": sorted(set(outcomes)), "exit_code": served.process.returncode}
        assert 200 not in outcomes
        assert served.process.returncode == 1
        served._reader.join(10)
        assert served.said[-1].startswith("safegene: vLLM's server ended by itself")
