"""The HTML report of evaluation runs, as text and in a browser."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import CHROMIUM, shown
from safegene.cli import main
from safegene.evaluation import evaluate, judges, suite
from safegene.evaluation.eval_report import commands, differences, read_runs
from safegene.evaluation.judges import RuleJudge


@pytest.fixture
def run(place: Path) -> Path:
    """Three suites put to a tiny model."""
    folder, out = place / "base", place / "one"
    suites = ["safetyeval", "over_refusal", "multi_turn"]
    evaluate.evaluate(str(folder), suites, out, judge=RuleJudge(), n=16, tokens=8, dtype="float32")
    return out


def test_report_shows_runs_and_their_differences(tmp_path: Path, run: Path) -> None:
    shutil.copytree(run, tmp_path / "two")
    assert main(["report", str(run), str(tmp_path / "two"), "--out", str(tmp_path / "r.html")]) == 0
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
    assert main(["report", str(run), str(tmp_path / "two")]) == 1
    assert main(["report", str(tmp_path / "nothing")]) == 1


def test_wrapped_requests_are_compared_by_request_and_shown_by_family(place: Path) -> None:
    folder, out = place / "base", place / "one"
    evaluate.evaluate(str(folder), ["safetyeval"], out, judge=RuleJudge(), wrap=2, tokens=8, dtype="float32")
    shutil.copytree(out, place / "two")
    scored = place / "two" / "scores-rules.json"
    said = json.loads(scored.read_text())
    for outcome in said["suites"]["safetyeval-wrapped"]["outcomes"]:
        outcome["ok"] = True
    scored.write_text(json.dumps(said))
    found, left_out = differences(read_runs([out, place / "two"]))
    assert left_out == []
    (d,) = found
    assert (d.n, d.after, d.ranked) == (2, 1.0, False)  # two requests, not 56 answers, so nothing is told
    assert main(["report", str(out), str(place / "two"), "--out", str(place / "r.html")]) == 0
    page = (place / "r.html").read_text()
    assert "Jailbreak wrappers by family: safetyeval-wrapped" in page
    assert "payload splitting" in page
    assert "--wrap 2" in page
    assert "safetyeval,over_refusal" not in page


def test_scores_of_another_version_are_one_line(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored = run / "scores-rules.json"
    whole = json.loads(scored.read_text())

    def without(*path: str) -> dict[str, Any]:
        found = json.loads(json.dumps(whole))
        part = found
        for key in path[:-1]:
            part = part[key]
        del part[path[-1]]
        return dict(found)

    others: list[dict[str, Any]] = [
        without("adapter_name"), without("suites", "safetyeval", "outcomes"), without("suites", "safetyeval", "harmful", "macro"),
        without("suites", "safetyeval", "harmful", "score", "low"), {**whole, "suites": ["safetyeval"]}, {**whole, "suites": {"code": None}},
    ]  # fmt: skip
    for other in others:
        scored.write_text(json.dumps(other))
        assert main(["report", str(run), "--out", str(tmp_path / "r.html")]) == 1
        said = capsys.readouterr().err
        assert "is of another version" in said
        assert said.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the driver's pipes
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (.ci/run installs it)")
def test_the_report_in_a_browser(tmp_path: Path, run: Path) -> None:
    assert main(["report", str(run), "--out", str(tmp_path / "r.html")]) == 0
    with shown(tmp_path / "r.html") as page:
        assert page.locator("svg").count() == 4
        folded = page.locator("details").first
        assert not folded.locator("> :not(summary)").first.is_visible()
        folded.locator("summary").click()
        assert folded.locator("> :not(summary)").first.is_visible()


def test_the_command_names_the_judge_that_a_person_can_ask_for(run: Path) -> None:
    said = json.loads((run / "scores-rules.json").read_text())
    assert "--judge" not in commands(said)[0]
    for name in ("default", "classifier", "keywords"):
        judge = judges.load(name)
        (line,) = commands({**said, "judge": judge.name, "judge_asked_as": judge.asked_as})
        assert line.endswith(f"--judge {name}")
        assert judges.load(line.split()[-1]).name == judge.name
