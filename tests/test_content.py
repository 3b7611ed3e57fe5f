"""SafetyEval's content: sizes, form, wrappers."""

from __future__ import annotations

import collections
import re
from pathlib import Path

import pytest

from safegene.errors import DataError
from safegene.evaluation import suite
from safegene.evaluation.suite import Sample
from safegene.evaluation.wrappers import WRAPPERS

OWN = ("safetyeval", "over_refusal", "multi_turn", "code", "medical", "legal", "finance")


FUNCTION_WORDS = set(
    [
        "a",
        "an",
        "the",
        "of",
        "to",
        "in",
        "on",
        "at",
        "for",
        "from",
        "by",
        "with",
        "without",
        "and",
        "or",
        "but",
        "if",
        "so",
        "that",
        "this",
        "these",
        "those",
        "my",
        "your",
        "his",
        "her",
        "our",
        "their",
        "its",
        "i",
        "you",
        "he",
        "she",
        "we",
        "they",
        "it",
        "me",
        "him",
        "us",
        "them",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "am",
        "do",
        "does",
        "did",
        "have",
        "has",
        "had",
        "can",
        "could",
        "would",
        "should",
        "will",
        "may",
        "might",
        "must",
        "what",
        "how",
        "why",
        "when",
        "where",
        "who",
        "which",
        "whose",
        "there",
        "here",
        "no",
        "not",
        "as",
        "about",
        "into",
        "out",
        "up",
        "down",
        "over",
        "than",
        "then",
        "just",
        "please",
    ]
)


@pytest.fixture(scope="module")
def content() -> dict[str, list[Sample]]:
    return {name: suite.load(name) for name in OWN}


def test_content_has_its_size(content: dict[str, list[Sample]]) -> None:
    harmful = collections.Counter(s.category for s in content["safetyeval"])
    twins = collections.Counter(s.category for s in content["over_refusal"])
    assert set(harmful) == set(twins) == set(suite.CATEGORIES)
    assert min(harmful.values()) >= 40
    assert min(twins.values()) >= 25
    assert len(content["safetyeval"]) >= 600
    assert len(content["over_refusal"]) >= 375
    for category in suite.CATEGORIES:
        assert len({s.form for s in content["safetyeval"] if s.category == category}) >= 6
    assert [sum(s.harmful is side for s in content["multi_turn"]) for side in (True, False)] >= [80, 40]
    assert [sum(s.harmful is side for s in content["code"]) for side in (True, False)] >= [80, 80]
    for vertical in suite.VERTICALS:
        assert [sum(s.harmful is side for s in content[vertical]) for side in (True, False)] >= [60, 60]
    assert len(WRAPPERS) >= 25


def test_content_is_well_formed(content: dict[str, list[Sample]]) -> None:
    every = [s for samples in content.values() for s in samples]
    ids = {s.id for s in every}
    assert len(ids) == len(every)
    assert all(not s.twin_of or s.twin_of in ids for s in every)
    assert all(s.severity in (1, 2, 3) for s in every if s.harmful)
    assert all(0 <= s.harmful_from < len(s.turns) for s in every)
    assert all(3 <= len(s.turns) <= 6 for s in content["multi_turn"])
    single = [s.turns[0] for s in every if len(s.turns) == 1]
    assert len({t.lower() for t in single}) == len(single)
    skeletons = collections.Counter(
        " ".join(w if w in FUNCTION_WORDS else "_" for w in re.findall(r"[a-z']+", t.lower())) for t in single
    )
    assert max(skeletons.values()) <= 3


def test_the_manifest_counts_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = suite.manifest()
    files = {f.name: f.read_text(encoding="utf-8").strip().split("\n") for f in suite.CONTENT.glob("*.jsonl")}
    assert manifest["counts"] == {name: len(lines) for name, lines in files.items()}
    assert manifest["version"] == suite.CONTENT_VERSION
    assert manifest["licence"] == "Apache-2.0"
    assert manifest["provenance"]
    monkeypatch.setattr(suite, "CONTENT", tmp_path)
    with pytest.raises(DataError, match="install safegene again"):
        suite.manifest()


def test_wrappers_apply_to_any_request() -> None:
    for wrapper in WRAPPERS.values():
        for request in ("Hi", 'Say "x" {now}\nand \\ then', "naïve café 你好"):
            made = wrapper.make(request)
            assert made.turn.strip()
            assert len(made.turn) < 2000
    wrapped = suite.load("jailbreak")
    assert len(wrapped) == len({s.id for s in wrapped}) == 40 * len(WRAPPERS)
    assert len({s.category for s in wrapped}) == 15
    assert any(s.opening for s in wrapped)
