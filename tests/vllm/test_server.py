"""`safegene serve --engine vllm`, asked by the official client."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from harness import Served, compare, of, serving

KEY = "sk-test"
REQUESTS, APART = 64, 0.1
"""Streaming requests, and seconds between their arrivals."""


@pytest.fixture(scope="module")
def served(reference: dict[str, Any]) -> Iterator[Served]:
    with serving(reference, key=KEY) as found:
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
        assert httpx.post(served.url + path, json={}, headers={"Authorization": f"Bearer {KEY}"}).status_code == 404


def test_it_wants_its_key(served: Served, reference: dict[str, Any]) -> None:
    other = openai.OpenAI(base_url=f"{served.url}/v1", api_key="sk-other", max_retries=0)
    with other, pytest.raises(openai.AuthenticationError):
        other.models.list()
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY) as client:
        assert [m.id for m in client.models.list()] == [reference["model"]]
        said = client.chat.completions.create(
            model=reference["model"], messages=[{"role": "user", "content": "Name a colour."}], max_tokens=8
        )
        assert said.choices[0].message.content


def test_a_signal_ends_it_well(reference: dict[str, Any]) -> None:
    with serving(reference, "--enforce-eager") as served:
        served.process.send_signal(signal.SIGTERM)
        served.wait_for(served.ended, 90)
        assert served.process.returncode == 0


def test_a_killed_worker_ends_it(reference: dict[str, Any], figures: dict[str, Any]) -> None:
    """No answer comes from what is left; the command says so in one line."""
    with serving(reference, "--enforce-eager") as served:
        found = re.search(r"EngineCore[^)]*pid=(\d+)", "".join(served.said))
        assert found
        os.kill(int(found[1]), signal.SIGKILL)
        outcomes = []
        while not served.ended():
            with contextlib.suppress(httpx.TransportError):
                body = {"model": reference["model"], "prompt": "Hello", "max_tokens": 4}
                outcomes.append(httpx.post(f"{served.url}/v1/completions", json=body, timeout=30).status_code)
        served.wait_for(served.ended, 60)
        figures["killed_worker"] = {"statuses": sorted(set(outcomes)), "exit_code": served.process.returncode}
        assert 200 not in outcomes
        assert served.process.returncode == 1
        served._reader.join(10)
        assert served.said[-1].startswith("safegene: vLLM's server ended by itself")
