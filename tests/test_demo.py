"""The demo on a tiny model: what it prints, its page, and what it says before any work."""

from __future__ import annotations

import errno
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from conftest import ANCHORS, random_adapter, tiny
from safegene.cli import main
from safegene.evaluation import demo as module
from safegene.evaluation.demo import HELD_OUT, DemoResult, demo, harmful_prompts
from safegene.training import data

VARIANTS = ["base", "base+adapter", "fine-tune", "fine-tune+adapter"]
KEYS = {"model", "parameter_share", "rows", "retention", "recovery", "overhead", "attach_seconds", "seconds"}


@pytest.fixture
def asked(place: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line of a demo of a tiny base with a random adapter, which calibration lets pass."""
    random_adapter(tiny(), tokenizer, anchors=ANCHORS).save_pretrained(place / "adapter")
    monkeypatch.setattr("safegene.calibration.MIN_SEPARATION", 0.0)
    return ["demo", "--model", str(place / "base"), "--adapter", str(place / "adapter"), "--n", "8"]


def test_it_prints_one_object_and_writes_a_page(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[DemoResult] = []

    def quick(*arguments: Any, **options: Any) -> DemoResult:
        made.append(demo(*arguments, steps=2, pairs=3, **options))
        return made[-1]

    monkeypatch.setattr(module, "demo", quick)
    page = tmp_path / "new" / "demo.html"
    assert main([*asked, "--out", str(page), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) >= KEYS
    assert [row["variant"] for row in found["rows"]] == VARIANTS
    for row in found["rows"]:
        assert isinstance(row["task_loss"], float)
        for name in ("safety_score", "over_refusal"):
            rate = row[name]
            assert set(rate) >= {"value", "n", "low", "high"}
            assert rate["n"] == 8
            assert 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1
    assert found["model"] == str(tmp_path / "base")
    assert 0 < found["parameter_share"] < 1
    assert all(found[key] > 0 for key in ("attach_seconds", "seconds"))
    for name in ("retention", "recovery"):
        assert found[name] is None or isinstance(found[name], float)
    assert set(found["overhead"]) == {"prefill", "decode"}
    assert all(isinstance(cost["value"], float) for cost in found["overhead"].values())

    text = page.read_text()
    assert "<svg" in text
    assert all(f"<td>{variant}" in text for variant in VARIANTS)
    assert all(example["prompt"].split()[0] in html.unescape(text) for example in found["examples"])
    linked = re.sub(r"http://www.w3.org|http://purl.org|https?://(?:creativecommons|matplotlib)\S+", "", text)
    assert "http" not in linked  # nothing is fetched from anywhere

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "demo", lambda *_, **__: made[0])
    monkeypatch.setattr("safegene.evaluation.report.write", full)
    assert main([*asked, "--out", str(page)]) == 1
    said = capsys.readouterr()
    assert "fine-tune" in said.out  # the figures were not lost with the page
    assert "free space" in said.err


def test_what_cannot_work_is_said_before_any_work(
    asked: list[str], tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(module, "finetune", never)
    tiny("qwen2").save_pretrained(tmp_path / "qwen2")
    tokenizer.save_pretrained(tmp_path / "qwen2")
    place = ["--out", str(tmp_path / "demo.html")]
    assert main([*asked, *place, "--model", str(tmp_path / "qwen2")]) == 1
    assert "llama models" in capsys.readouterr().err
    assert not (tmp_path / "demo.html").exists()
    monkeypatch.setattr("safegene.models.load", never)
    for bad, said in ((tmp_path, "is a folder"), (tmp_path / "rows.jsonl" / "demo.html", "is a file")):
        assert main([*asked, "--out", str(bad)]) == 1
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("n", [21, 40, 100, 200])
def test_its_harmful_requests_come_from_every_category(n: int) -> None:
    chosen = harmful_prompts(n)
    pairs = {p.harmful: p for p in data.pairs(seed=1, frames_per_core=8, held_out=HELD_OUT)[1]}
    assert len(chosen) == len(set(chosen)) == n
    assert len({pairs[prompt].core for prompt in chosen}) == n
    assert {pairs[prompt].category for prompt in chosen} == {p.category for p in pairs.values()}
    assert harmful_prompts(n) == chosen
