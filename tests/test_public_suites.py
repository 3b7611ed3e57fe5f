"""Public sets: files as their authors publish them, snapshots of the hub, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from huggingface_hub.errors import GatedRepoError
from pyarrow import parquet

from safegene.errors import DataError
from safegene.evaluation import evaluate, public_suites

FIXTURES: dict[str, tuple[str, str]] = {
    "advbench": ("harmful_behaviors.csv", "goal,target\nask,Sure\n"),
    "harmbench": ("harmbench_behaviors_text_test.csv", "Behavior,ContextString,SemanticCategory\nask,,chemical\n"),
    "jailbreakbench": ("jailbreakbench.csv", "Goal,Category\nask,Fraud\n"),
    "strongreject": ("strongreject_dataset.csv", "category,source,forbidden_prompt\nViolence,x,ask\n"),
    "xstest": ("xstest_prompts.csv", "id,prompt,type,label\n1,ask,homonyms,safe\n2,ask,contrast,unsafe\n"),
    "do_not_answer": ("do_not_answer_en.csv", "risk_area,question\nx,ask\n"),
    "or_bench": ("or-bench-hard-1k.csv", "prompt,category\nask,violence\n"),
    "or_bench_80k": ("or_bench_80k.csv", "prompt,category\nask,violence\n"),
    "or_bench_toxic": ("or-bench-toxic.csv", "prompt,category\nask,violence\n"),
    "sorry_bench": ("sorry_bench.csv", "question_id,category,turns\n1,4,ask\n"),
    "cosafe": ("CoSafe datasets/self_harm.json", '[[{"role":"user","content":"hi"},{"role":"assistant","content":"yes"},{"role":"user","content":"it?"}]]'),
    "cyberseceval_frr": ("mitre_frr.json", '[{"mutated_prompt":"ask","attack_type":"x","is_malicious":"benign"}]'),
}  # fmt: skip


@pytest.mark.parametrize("name", FIXTURES)
def test_public_sets_are_read_as_published(name: str, tmp_path: Path) -> None:
    file, text = FIXTURES[name]
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    for source in (tmp_path, path):
        samples = public_suites.load(name, str(source))
        assert samples
        assert all(s.turns[0] and s.source == name for s in samples)
    path.write_text(json.dumps([{"foreign": "column"}]) if path.suffix == ".json" else "foreign\nx\n")
    with pytest.raises(DataError, match="lacks what"):
        public_suites.load(name, str(path))
    assert set(FIXTURES) == set(public_suites.PUBLIC)


def test_public_sets_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no advbench"):
        public_suites.load("advbench", str(tmp_path))
    (tmp_path / "x.bin").write_text("x")
    with pytest.raises(DataError, match="no format"):
        public_suites.load("advbench", str(tmp_path / "x.bin"))
    with pytest.raises(DataError, match="--data"):
        evaluate.samples_of("advbench", None)


TRAIN = "data/train-00000-of-00001-6ba0076b818accff.parquet"
SNAPSHOTS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "advbench": {TRAIN: [{"prompt": "ask", "target": "Sure"}]},
    "harmbench": {
        "standard/train-00000-of-00001.parquet": [{"prompt": "ask", "category": "illegal"}],
        "contextual/train-00000-of-00001.parquet": [{"prompt": "ask", "context": "This.", "category": "illegal"}],
        "copyright/train-00000-of-00001.parquet": [{"prompt": "ask", "tags": ["book"]}],
    },
    "strongreject": {TRAIN: [{"prompt": "ask", "category": "Violence", "source": "custom"}]},
    "xstest": {"data/test-00000-of-00001.parquet": [{"prompt": "ask", "type": "homonyms", "label": "safe"}]},
    "do_not_answer": {TRAIN: [{"id": 0, "risk_area": "x", "question": "ask", "GPT4_response": "No."}]},
    "jailbreakbench": {
        "data/harmful-behaviors.csv": [{"Goal": "ask", "Category": "Fraud"}],
        "data/benign-behaviors.csv": [{"Goal": "other", "Category": "Fraud"}],
    },
    "or_bench": {
        "or-bench-hard-1k.csv": [{"prompt": "ask", "category": "violence"}],
        "or-bench-80k.csv": [{"prompt": "other", "category": "violence"}] * 3,
        "or-bench-toxic.csv": [{"prompt": "other", "category": "violence"}] * 2,
    },
    "sorry_bench": {
        "question.jsonl": [{"question_id": 1, "category": "4", "turns": ["ask"], "prompt_style": "base"}],
        "question_slang.jsonl": [{"question_id": 1, "category": "4", "turns": ["other"], "prompt_style": "slang"}],
    },
}


def snapshot(folder: Path, files: dict[str, list[dict[str, Any]]]) -> Path:
    """A hub data set as `snapshot_download` leaves it, below a folder whose name says nothing."""
    for name, rows in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif path.suffix == ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_snapshots_of_the_hub_are_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = snapshot(tmp_path / "74e74f2e", SNAPSHOTS[name])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda source, repo_type: str(folder))
    samples = public_suites.load(name, public_suites.PUBLIC[name].hub)
    assert len(samples) == (3 if name == "harmbench" else 1)
    assert {s.turns[0].removeprefix("This.\n\n") for s in samples} == {"ask"}
    assert all(s.category for s in samples)
    assert samples[0].harmful is (name not in ("xstest", "or_bench"))
    if name == "harmbench":
        assert {s.category for s in samples} == {"illegal", "copyright"}
        assert public_suites.load(name, str(folder / "standard"))[0].turns == ("ask",)


def test_the_parts_of_or_bench_are_suites_of_their_own(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "snapshot", SNAPSHOTS["or_bench"])
    sizes = {n: len(public_suites.load(n, str(folder))) for n in ("or_bench", "or_bench_80k", "or_bench_toxic")}
    assert sizes == {"or_bench": 1, "or_bench_80k": 3, "or_bench_toxic": 2}
    assert all(s.harmful for s in public_suites.load("or_bench_toxic", str(folder)))
    with pytest.raises(DataError, match="read from or-bench-hard-1k"):
        public_suites.load("or_bench", str(folder / "or-bench-toxic.csv"))


def test_a_snapshot_of_another_set_is_refused(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "snapshot", SNAPSHOTS["strongreject"])
    for name in ("advbench", "do_not_answer"):
        with pytest.raises(DataError, match="lacks what"):
            public_suites.load(name, str(folder))
    two_turns = {"question.jsonl": [{"question_id": 81, "category": "writing", "turns": ["one", "two"]}]}
    with pytest.raises(DataError, match="lacks what"):
        public_suites.load("sorry_bench", str(snapshot(tmp_path / "mt-bench", two_turns)))


def test_each_suite_may_have_its_own_place(tmp_path: Path) -> None:
    here = tmp_path / "a=b"
    here.mkdir()
    items = ["xstest=walledai/XSTest", str(here), "advbench=walledai/AdvBench"]
    assert public_suites.places(items) == {"xstest": "walledai/XSTest", "": str(here), "advbench": "walledai/AdvBench"}
    assert public_suites.places([]) == {}
    for wrong, message in (
        (["advbnch=walledai/AdvBench"], "no public set 'advbnch'"),
        (["one", "two"], "two places for all sets"),
        (["xstest=one", "xstest=two"], "two places for xstest"),
    ):
        with pytest.raises(DataError, match=message):
            public_suites.places(wrong)


def test_a_gated_set_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(source: str, repo_type: str) -> str:
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr("huggingface_hub.snapshot_download", gated)
    with pytest.raises(DataError, match="accept its terms"):
        public_suites.load("advbench", "walledai/AdvBench")
