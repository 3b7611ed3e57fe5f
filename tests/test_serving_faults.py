"""Faults of the server: never an answer without protection. The playground, audit and figures."""

from __future__ import annotations

import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from conftest import CHROMIUM
from safegene.serving.app import finite
from safegene.serving.audit import Audit
from served import CHAT, FAR, KEY, NAME, alone, middle, serving, whole

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
        if picture := os.environ.get("SAFEGENE_SCREENSHOT"):  # for the docs: a path that ends in .png
            page.screenshot(path=picture, full_page=True)
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
