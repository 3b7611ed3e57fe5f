"""SafetyEval: content, wrappers, runner, scores, judges, public sets."""

from __future__ import annotations

import collections
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny
from safegene.cli import main
from safegene.cli._run import run
from safegene.errors import DataError
from safegene.evaluation import agreement, evaluate, judges, public_suites, runner, scores, suite
from safegene.evaluation.judges import Judge, RuleJudge, Verdict, asked
from safegene.evaluation.lm_eval import tasks
from safegene.evaluation.statistics import clustered_rate, compare, macro_average
from safegene.evaluation.suite import Sample
from safegene.evaluation.wrappers import WRAPPERS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
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


SAMPLES = [
    Sample("a", "x", True, ("Do harm",), severity=2),
    Sample("b", "x", False, ("Say hello to my aunt",)),
    Sample("c", "y", True, ("Hello", "And now harm"), harmful_from=1, opening="Sure, "),
]


class Scripted(Judge):
    """Calls every answer what it is told to; fails at the `fail_at`-th."""

    name = "scripted"

    def __init__(self, fail_at: int = -1) -> None:
        self.fail_at, self.seen = fail_at, 0
        self.heard: list[str] = []

    def judge(self, conversation: Any, response: str) -> Verdict:
        self.heard.append(response)
        if self.seen == self.fail_at:
            raise DataError("the judge is gone; run again.")
        self.seen += 1
        return Verdict(
            "refusal" if conversation[-1]["content"] != "And now harm" else "harmful compliance", 0.9, "told so"
        )


def test_a_killed_run_goes_on_and_equals_an_unbroken_one(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    model = tiny()
    monkeypatch.setattr(runner, "BATCH", 1)
    about = runner.record(runner.model_record("tiny", model, tokens=4), "s", SAMPLES)
    whole = runner.generate(model, tokenizer, SAMPLES, tmp_path / "whole", about, tokens=4)
    assert [(a.id, a.turn) for a in whole] == [("a", 0), ("b", 0), ("c", 0), ("c", 1)]

    calls = 0
    original = runner._converse

    def killed(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(runner, "_converse", killed)
    with pytest.raises(KeyboardInterrupt):
        runner.generate(model, tokenizer, SAMPLES, tmp_path / "cut", about, tokens=4)
    path = tmp_path / "cut" / "answers.jsonl"
    path.write_text(path.read_text() + '{"id": "b", "tu')  # the line that the kill cut off
    again = runner.generate(model, tokenizer, SAMPLES, tmp_path / "cut", about, tokens=4)
    assert again == whole
    assert calls == 4  # the first batch was not answered twice
    with pytest.raises(DataError, match="tokens differ"):
        runner.generate(model, tokenizer, SAMPLES, tmp_path / "cut", {**about, "tokens": 5}, tokens=5)


def test_a_judge_that_fails_half_way_loses_nothing(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    model = tiny()
    about = runner.record(runner.model_record("tiny", model, tokens=4), "s", SAMPLES)
    answers = runner.generate(model, tokenizer, SAMPLES, tmp_path, about, tokens=4)
    with pytest.raises(DataError, match="gone"):
        runner.judge(SAMPLES, answers, Scripted(fail_at=2), tmp_path)
    second = Scripted()
    judged = runner.judge(SAMPLES, answers, second, tmp_path)
    assert second.seen == 2
    assert len(judged) == 4

    class Other(Scripted):
        fingerprint = "scripted, second edition"

    other = Other()
    runner.judge(SAMPLES, answers, other, tmp_path)
    assert other.seen == 4  # verdicts of another edition are not this one's
    (prefilled,) = [a for a in answers if a.opening]
    assert prefilled.response in other.heard  # what the model wrote, without the words put into its mouth
    assert prefilled.whole not in other.heard
    assert runner.kept(tmp_path) == (about, SAMPLES, answers)
    chat = runner.conversation(SAMPLES[2], [a for a in answers if a.id == "c"], 1)
    assert [m["role"] for m in chat] == ["user", "assistant", "user"]
    lines = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match="lacks 1 answers"):
        runner.kept(tmp_path)
    (tmp_path / "samples.jsonl").write_text("")
    with pytest.raises(DataError, match="do not belong together"):
        runner.kept(tmp_path)


def test_scores_count_what_each_side_owes() -> None:
    def judged(sample: Sample, *labels: Any) -> list[runner.Judged]:
        return [
            runner.Judged(sample, runner.Answer(sample.id, t, "text"), Verdict(label, 0.9, ""))
            for t, label in enumerate(labels)
        ]

    found = judged(SAMPLES[0], "refusal") + judged(SAMPLES[1], "refusal")
    found += judged(SAMPLES[2], "harmful compliance", "safe completion")  # its first turn was innocent
    found += judged(Sample("d", "y", True, ("Harm",)), "incoherent")
    s = scores.score("s", found)
    assert s.harmful is not None
    assert s.harmless is not None
    assert (s.harmful.score.value, s.harmful.score.n) == (2 / 3, 3)
    assert s.harmful.score_coherent is not None
    assert s.harmful.score_coherent.value == 1.0
    assert s.harmful.macro.value == pytest.approx(0.75)
    assert s.harmless.score.value == 1.0
    assert [r.n for r in s.harmful.by_turn] == [3]  # from the turn on that must not be served
    assert s.harmful.asr is not None
    assert s.harmful.asr.value == 0.0
    assert [w["id"] for w in scores.worst(found)][-1] == "b"


def test_rows_survive_a_cut_in_the_middle_of_a_letter(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"a": "  é"}\n{"a": "é'.encode()[:-1])
    assert runner.read_rows(path) == [{"a": "  é"}]
    assert runner.read_rows(path) == [{"a": "  é"}]
    path.write_bytes(b'{"a": \n{"b": 1}\n')
    with pytest.raises(DataError, match="damaged"):
        runner.read_rows(path)


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text("")
    with pytest.raises(DataError, match="unknown run"):
        runner.claim(tmp_path, {"model": "m"})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        runner.claim(tmp_path, {"model": "m"})


def test_smaller_samples_are_spread_and_begin_larger_ones() -> None:
    some, more = (suite.sample_evenly(suite.load("safetyeval"), n) for n in (15, 60))
    assert more[:15] == some
    assert len({s.category for s in some}) == 15
    assert len({s.form for s in more}) == 7
    assert len({s.wrapper for s in suite.sample_evenly(suite.load("jailbreak"), 28)}) == 28


def test_comparisons_are_paired_and_corrected() -> None:
    same = [True, False] * 20
    better = [True] * 38 + [False] * 2
    clear, noise = compare({"clear": (same, better), "noise": (same, [*same[:-1], True])})
    assert clear.ranked
    assert not noise.ranked
    assert clear.low <= clear.value <= clear.high
    assert noise.corrected >= noise.p
    r = macro_average([[True] * 10, [False] * 1000])
    assert r.value == 0.5
    sure = macro_average([[True] * 41] * 15)
    assert sure.value == 1.0
    assert sure.low < 1.0
    few = macro_average([[False] * 5] * 14 + [[True, False]])
    assert few.low <= few.value <= few.high
    alike = clustered_rate([True] * 30 + [False] * 30, ["a"] * 30 + ["b"] * 30)
    assert (alike.low, alike.high) == (0.0, 1.0)
    with pytest.raises(ValueError, match="same prompts"):
        compare({"x": ([True], [True, False])})


def test_evaluate_and_judge_again(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "model"
    tiny().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = evaluate.evaluate(
        str(folder), ["safetyeval", "over_refusal"], tmp_path / "out", judge=RuleJudge(), n=4, tokens=8, dtype="float32"
    )
    assert set(found["suites"]) == {"safetyeval", "over_refusal"}
    again = evaluate.rejudge(tmp_path / "out", Scripted())
    assert again["suites"]["over_refusal"]["harmless"]["score"]["value"] == 1.0
    assert again["suites"]["safetyeval"]["asked"] == found["suites"]["safetyeval"]["asked"]
    with pytest.raises(DataError, match="no run"):
        evaluate.rejudge(tmp_path / "nothing", Scripted())


def test_the_command_line_lists_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--list", "--json"]) == 0
    listed = {s["suite"]: s for s in json.loads(capsys.readouterr().out)["suites"]}
    assert listed["safetyeval"]["categories"] == 15
    assert listed["jailbreak"]["harmful"] >= 25 * 40
    assert main(["eval", "--suite", "nothing"]) == 1
    assert "no suite 'nothing'" in capsys.readouterr().err
    assert main(["eval", "--judge", "nobody"]) == 1
    assert "no judge" in capsys.readouterr().err
    assert main(["judge"]) == 2


FIXTURES: dict[str, tuple[str, str]] = {
    "advbench": ("harmful_behaviors.csv", "goal,target\nask,Sure\n"),
    "harmbench": ("harmbench_behaviors_text_test.csv", "Behavior,ContextString,SemanticCategory\nask,,chemical\n"),
    "jailbreakbench": ("jailbreakbench.csv", "Goal,Category\nask,Fraud\n"),
    "strongreject": ("strongreject_dataset.csv", "category,source,forbidden_prompt\nViolence,x,ask\n"),
    "xstest": ("xstest_prompts.csv", "id,prompt,type,label\n1,ask,homonyms,safe\n2,ask,contrast,unsafe\n"),
    "do_not_answer": ("do_not_answer_en.csv", "risk_area,question\nx,ask\n"),
    "or_bench": ("or-bench-hard-1k.csv", "prompt,category\nask,violence\n"),
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


def test_agreement_counts_on_the_held_out_third() -> None:
    rows = [
        agreement.Labelled(f"question {i}", "I cannot help with that." if i % 2 else "Sure.", bool(i % 2), "c")
        for i in range(90)
    ]
    held_out = [r for r in rows if r.held_out]
    assert 15 < len(held_out) < 45
    human = agreement.HumanSet("s", "refused", "refusal", rows)
    found = agreement.agreement(human, [RuleJudge().judge(asked(r.question), r.answer) for r in held_out], held_out)
    assert found.accuracy.value == found.kappa == found.f1 == 1.0


def test_lm_eval_scores_as_our_own_runner_does() -> None:
    doc = {"request": "ask"}
    assert tasks.safe(doc, ["I cannot help with that."]) == {"safety_score": 1.0, "incoherent": 0.0}
    assert tasks.safe(doc, ["Sure, here it is."]) == {"safety_score": 0.0, "incoherent": 0.0}
    assert tasks.refused(doc, ["I cannot help with that."]) == {"over_refusal": 1.0, "incoherent": 0.0}
    assert tasks.refused(doc, [""]) == {"over_refusal": 0.0, "incoherent": 1.0}
    for path in Path(tasks.__file__).parent.glob("*.yaml"):
        for name in re.findall(r"!function tasks\.(\w+)", path.read_text()):
            assert callable(getattr(tasks, name))


def test_out_of_memory_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    def broken() -> None:
        raise RuntimeError("something else")

    assert run("eval", full, []) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(RuntimeError, match="something else"):
        run("eval", broken, [])


def test_an_endpoint_judges_by_rubric() -> None:
    replies = iter(
        ['{"refused": 1, "specific": 1, "convincing": 1}', '{"refused": 0, "specific": 5, "convincing": 4}', "hm"]
    )

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps({"choices": [{"message": {"content": next(replies)}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    judge = judges.load(f"http://127.0.0.1:{server.server_port}/v1#model")
    assert judge.judge(asked("x"), "I will not do that for you.").label == "refusal"
    assert judge.judge(asked("x"), "Here is all of it, in detail.").label == "harmful compliance"
    assert "no grade" in judge.judge(asked("x"), "Something else entirely.").reason
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match="did not answer"):
        judge.judge(asked("x"), "Something else entirely.")
    with pytest.raises(DataError, match="names no model"):
        judges.load("http://host/v1")


def test_report_shows_runs_and_their_differences(tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    suites = ["safetyeval", "over_refusal", "multi_turn"]
    evaluate.evaluate(str(folder), suites, tmp_path / "one", judge=RuleJudge(), n=16, tokens=8, dtype="float32")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert main(["report", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == 4
    assert not [s for s in suite.load("safetyeval") if f"<summary>{s.turns[0]}" in page]
    assert "<summary>" in page  # what was asked and said is folded away
    assert "noise" in page  # the two are the same, so neither is better
    assert "http" not in re.sub(
        r"http://www.w3.org|http://purl.org|https?://(?:creativecommons|matplotlib)\S+", "", page
    )
    scored = tmp_path / "two" / "scores-rules.json"
    scored.write_text(scored.read_text().replace(f'"content": "{suite.CONTENT_VERSION}"', '"content": "0.9"'))
    assert main(["report", str(tmp_path / "one"), str(tmp_path / "two")]) == 1
    assert main(["report", str(tmp_path / "nothing")]) == 1


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the driver's pipes
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (.ci/run installs it)")
def test_the_report_in_a_browser(tokenizer: Any, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    folder = tmp_path / "model"
    tiny().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    suites = ["safetyeval", "over_refusal", "multi_turn"]
    evaluate.evaluate(str(folder), suites, tmp_path / "one", judge=RuleJudge(), n=16, tokens=8, dtype="float32")
    assert main(["report", str(tmp_path / "one"), "--out", str(tmp_path / "r.html")]) == 0
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        asked: list[str] = []
        complaints: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto((tmp_path / "r.html").as_uri())
        for width in (390, 1280):  # a phone, a desk
            page.set_viewport_size({"width": width, "height": 844})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert [url for url in asked if not url.startswith("file:")] == []
        assert complaints == []
        assert page.locator("svg").count() == 4
        assert all((svg.bounding_box() or {"width": 0})["width"] > 100 for svg in page.locator("svg").all())
        folded = page.locator("details").first
        assert not folded.locator("> :not(summary)").first.is_visible()
        folded.locator("summary").click()
        assert folded.locator("> :not(summary)").first.is_visible()
        assert len(page.pdf()) > 10_000  # it prints
        browser.close()
