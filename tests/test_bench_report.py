"""The HTML page of the bench, made from a small result, as text and in a browser."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from conftest import CHROMIUM, shown
from safegene.evaluation import bench_report

HARMFUL = ("AdvBench", "JailbreakBench", "MaliciousInstruct", "HarmBench standard", "SafetyEval")
HARMLESS = ("twins", "XSTest safe", "Alpaca", "MT-Bench")
TUNED = {"gsm8k": "development", "<b>": "test"}
SAFE = {  # of ten: by method, on the base, gsm8k, <b>
    "nothing": (8, 3, 2), "adapter": (10, 9, 0), "fold": (9, 8, 7),
}  # fmt: skip


def share(hits: float, n: int = 50) -> dict[str, Any]:
    return {"value": hits, "n": n, "low": max(0.0, hits - 0.1), "high": min(1.0, hits + 0.1)}


def cell(name: str, method: str, safe: int) -> dict[str, Any]:
    """`safe` of ten requests of every harmful set are right; of the harmless ones the adapter refuses one a set on gsm8k."""
    refused = method == "adapter" and name == "<b>"
    outcomes = {key: {f"{key} {i}": i < safe for i in range(10)} for key in HARMFUL}
    served = 9 if (method, name) == ("adapter", "gsm8k") else 10
    if not refused:  # what the fine-tune serves by itself is not the method's
        outcomes |= {key: {f"{key} {i}": i < served for i in range(10)} for key in HARMLESS}
    return {
        "fine_tune": name, "use": TUNED.get(name, "base"), "method": method, "outcomes": outcomes,
        "refused_to_attach": "no longer tells <i>harm</i>" if refused else "",
        "task_loss": None if name == "base" or refused else 2.0 + 0.01 * (method == "fold"),
        "cost": {"examples": 40, "gradient_steps": 45 * (method == "fold"), "extra_parameters": 1234567, "extra_tokens": 0.0},
        "seconds": 1.5,
        "capability": {} if refused else {"MMLU": {f"q {i}": i < 6 for i in range(10)}},
    }  # fmt: skip


@pytest.fixture
def result() -> dict[str, Any]:
    """Two fine-tunes and the base, three methods; the adapter refuses one of the fine-tunes."""
    names = ("base", *TUNED)

    def attached(method: str) -> list[str]:
        return [name for name in names if (method, name) != ("adapter", "<b>")]

    summary = {
        method: {
            "source": "a paper", "fine_tunes": list(TUNED),
            "safety": {name: share(k / 10) for name, k in zip(names, safe, strict=True)},
            "refused": {
                key: {name: share(0.1 if (method, name) == ("adapter", "gsm8k") else 0.0, 10) for name in attached(method)}
                for key in HARMLESS
            },
            "incoherent": {
                key: {name: share(0.3 if (method, name) == ("nothing", "gsm8k") else 0.0, 10) for name in attached(method)}
                for key in (*HARMFUL, *HARMLESS)
            },
            "capability": {
                "MMLU": {name: share(0.6, 10) for name in attached(method)}, "ARC easy": {"gsm8k": share(0.2, 10)},
                "own task": {"gsm8k": share(0.25, 60)},
            },
            "retention": {name: share(k / safe[0]) for name, k in zip(TUNED, safe[1:], strict=True)},
            "task_loss_added": 0.0, "seconds": 1.5, "refused_to_attach": ["<b>"] if method == "adapter" else [],
            "cost": cell("base", method, 0)["cost"],
        }
        for method, safe in SAFE.items()
    }  # fmt: skip
    against = [
        {"name": "nothing, safety", "before": 0.25, "after": 0.45, "value": 0.2, "low": 0.1, "high": 0.3, "n": 50, "p": 0.01,
         "corrected": 0.03, "ranked": True},
        {"name": "fold, safety", "before": 0.75, "after": 0.45, "value": -0.3, "low": -0.4, "high": -0.2, "n": 50, "p": 0.001,
         "corrected": 0.004, "ranked": True},
        {"name": "fold, served", "before": 1.0, "after": 0.95, "value": -0.05, "low": -0.1, "high": 0.0, "n": 40, "p": 0.5,
         "corrected": 1.0, "ranked": False},
    ]  # fmt: skip
    abilities = [
        {"name": "adapter, general capability", "before": 0.4, "after": 0.38, "value": -0.02, "low": -0.04, "high": -0.01, "n": 150,
         "p": 0.01, "corrected": 0.02, "ranked": True},
        {"name": "fold, own task", "before": 0.25, "after": 0.25, "value": 0.0, "low": 0.0, "high": 0.0, "n": 60, "p": 1.0,
         "corrected": 1.0, "ranked": False},
    ]  # fmt: skip
    overhead = {"decode, batch 1": {"value": 0.01, "low": 0.005, "high": 0.017, "n": 200, "open": 0.0}}
    drift = {
        "rows": [
            {"fine_tune": "gsm8k", "drift": 1.2, "lost": 0.1, "calibrated": 0.9, "uncalibrated": 0.9, "refused": False, "forced": None},
            {"fine_tune": "<b>", "drift": 4.5, "lost": 0.6, "calibrated": 0.0, "uncalibrated": 0.4, "refused": True, "forced": 0.88},
        ],
        "spearman": {"value": 0.81, "low": 0.4, "high": 0.95, "n": 20}, "missed_refusals": [], "false_refusals": ["<b>"],
    }  # fmt: skip
    recovery = [
        {
            "fine_tune": "gsm8k",
            "parent": "base",
            "before": share(0.8),
            "without": share(0.3),
            "with": share(0.9),
            "recovery": 1.2,
        }
    ]
    return {
        "base": "tiny-base", "adapter": "tiny-adapter", "everywhere": summary, "together": copy.deepcopy(summary), "against": against,
        "abilities": abilities, "absent": ["ARC challenge"], "overhead": overhead,
        "drift": drift, "recovery": recovery,
        "cells": [cell(name, m, k) for m, safe in SAFE.items() for name, k in zip(names, safe, strict=True)],
    }  # fmt: skip


def page_of(result: dict[str, Any], folder: Path) -> str:
    bench_report.write(result, folder / "bench.html")
    return (folder / "bench.html").read_text(encoding="utf-8")


def headings(page: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", page)


def test_the_page_holds_every_figure(tmp_path: Path, result: dict[str, Any]) -> None:
    page = page_of(result, tmp_path)
    assert page.count("<svg") == 3
    assert headings(page) == [
        "What was asked, what was measured", "Where a rival wins", "Methods side by side", "Fine-tune by fine-tune",
        "Refused attachments", "The adapter against the others", "What the fine-tunes can still do", "Does it sense drift?", "Recovery",
        "Cost of one more fine-tune", "Time of prefill and decode", "To do it again",
    ]  # fmt: skip
    assert "http" not in re.sub(
        r"http://www.w3.org|http://purl.org|https?://(?:creativecommons|matplotlib)\S+", "", page
    )
    assert "<b>" not in page
    assert "<i>" not in page
    assert "adapter on &lt;b&gt;: no longer tells &lt;i&gt;harm&lt;/i&gt;" in page
    assert "0.81 [0.40, 0.95], n = 20" in page
    assert "Refused, but should have been attached: &lt;b&gt;." in page
    assert "forced, it keeps 88.0 %" in page
    assert "1,234,567" in page
    assert "<th>incoherent: harmless" in page
    assert re.search(
        r"15\.0 %<small>\[[\d.]+, [\d.]+\], n = 80<", page
    )  # nonsense of the unadapted fine-tunes, all harmless sets
    row = page[page.index('scope="rowgroup">&lt;b&gt; (test)') :]
    row = row[row.index("adapter (refused to attach)") :].split("</tr>")[0]
    assert row.count("<td>–") == 8  # seven shares of answers and the task loss: a refused attachment has none of them
    assert "does not hold it: ARC challenge." in page
    assert re.search(r"<tr><td>adapter<td>general capability<td>40\.0 %<td>38\.0 %\s*<td>-2\.0 \[-4\.0, -1\.0\]<td>150<td>0\.02\s*<td>less", page)  # fmt: skip
    assert "<td>decode, batch 1<td>+1.00 % [+0.50, +1.70]<td>200" in page
    row = page[page.index('scope="rowgroup">gsm8k (') :]
    assert "<td>40.0 %<small>[" in row.split("</tr>")[1]  # of 20 questions of two sets
    assert "<td>25.0 %<small>[" in row.split("</tr>")[1]
    assert "noise" in page
    assert "safegene bench recipes/" in page
    assert "safegene bench mine.yaml" in page_of({**result, "command": "safegene bench mine.yaml"}, tmp_path)


def test_figures_that_were_asked_for(result: dict[str, Any]) -> None:
    found = {f.figure.split(",")[0]: f for f in bench_report.findings(result)}
    kept = [f for f in bench_report.findings(result) if f.figure.startswith("Retention")]
    assert [f.here for f in kept] == [
        "0.0 % [0.0, 10.0], n = 50 over 1 fine-tune",
        "0.0 % [0.0, 10.0], n = 50 (<b>)",
    ]
    assert kept[0].verdict == "Goal missed by 99.00 points, bound by 95.00 points"
    public = found["Safety score on the public sets"]
    assert public.here.startswith("45.0 % [")
    assert "n = 80 over 2 fine-tunes; without adapter 25.0 % [" in public.here
    ordinary = found["Over-refusal on ordinary requests"]
    assert ordinary.here.startswith("+10.0 points [")  # on gsm8k alone: on the other the attachment was refused
    assert ordinary.here.endswith("n = 20 prompts; worst +10.0 (gsm8k)")
    assert found["XSTest safe refused"].verdict == "Goal missed by 2.00 points, bound kept"
    assert found["Task loss of the fine-tune's own task"].here.startswith("+0.00 %, n = 1 fine-tune;")
    assert "Cost of one more fine-tune" not in found  # no realignment beside it
    assert "Safety score" not in found  # fold, the one rival, trains
    result["cells"] += [{**cell("gsm8k", "sft", 9), "seconds": 60.0}]
    result["everywhere"]["fold"]["cost"]["gradient_steps"] = 0
    found = {f.figure.split(",")[0]: f for f in bench_report.findings(result)}
    cost = found["Cost of one more fine-tune"]
    assert (
        cost.here
        == "0 gradient steps; time of sft, the quickest realignment here, ÷ the adapter's: 40.0, n = 1 fine-tune"
    )
    assert cost.verdict == "Goal reached"
    assert found["Safety score"].here == "worse than fold (-30.0 [-40.0, -20.0], n = 50)"
    assert found["Safety score"].verdict == "Goal missed: not beaten fold"


def test_where_a_rival_wins(result: dict[str, Any]) -> None:
    wins = bench_report.wins(result)
    assert wins is not None
    assert [w.split(":")[0] for w in wins] == [
        "fold, safety score", "fold, mean over the fine-tunes that all methods share",
    ]  # fmt: skip
    assert "75.0 % against the adapter's 45.0 %, +30.0 points [+20.0, +40.0], n = 50 prompts" in wins[0]
    result["against"] = result["against"][:1]
    result["together"]["fold"]["safety"] = result["together"]["nothing"]["safety"]
    assert bench_report.wins(result) == []
    assert bench_report.wins({**result, "against": [], "together": {}}) is None


def test_retention_without_calibration_is_of_base_and_adapter(tmp_path: Path, result: dict[str, Any]) -> None:
    result["cells"] += [cell(name, "uncalibrated", k) for name, k in (("base", 5), ("gsm8k", 5), ("<b>", 4))]
    page = page_of(result, tmp_path)
    rows = re.findall(r"<tr><td>(\S+) \(\w+\)<td>[\d.]+<td>(\S+) %<small>\[[\d., ]+\], n = 50", page)
    assert rows == [("gsm8k", "50.0"), ("&lt;b&gt;", "40.0")]


def test_nonsense_serves_nobody(result: dict[str, Any]) -> None:
    """A rival that babbles refuses nothing, and wins nothing by it."""
    fold = result["together"]["fold"]
    result["against"] = result["against"][:1]
    assert [w.split(",")[0] for w in bench_report.wins(result) or []] == ["fold"]
    fold["incoherent"] = {key: {name: share(0.5, 10) for name in TUNED} for key in HARMLESS}
    assert bench_report.wins(result) == []


def test_what_could_not_be_measured_is_named(tmp_path: Path, result: dict[str, Any]) -> None:
    result["failed"] = [{"fine_tune": "gsm8k", "method": "dpo", "error": "RuntimeError: <out>"}]
    page = page_of(result, tmp_path)
    assert "Not measured" in headings(page)
    assert "dpo on gsm8k: RuntimeError: &lt;out&gt;" in page
    assert "dpo (not measured)<td>–" in re.sub(r"\s*\n\s*", "", page)


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        ({"together": {}}, ["Methods side by side"]),
        ({"against": []}, ["The adapter against the others"]),
        ({"abilities": [], "absent": []}, ["What the fine-tunes can still do"]),
        ({"overhead": {}}, ["Time of prefill and decode"]),
        ({"drift": None, "recovery": []}, ["Does it sense drift?", "Recovery"]),
        (
            {"against": [], "together": {}},
            ["Where a rival wins", "Methods side by side", "The adapter against the others"],
        ),
        ({"cells": []}, []),
    ],
)
def test_what_is_missing_is_left_out(
    tmp_path: Path, result: dict[str, Any], missing: dict[str, Any], gone: list[str]
) -> None:
    every = headings(page_of(result, tmp_path))
    assert headings(page_of({**result, **missing}, tmp_path)) == [h for h in every if h not in gone]


def test_little_is_enough(tmp_path: Path, result: dict[str, Any]) -> None:
    assert headings(page_of({"base": "tiny-base", "adapter": "none"}, tmp_path)) == ["To do it again"]
    for method in SAFE:
        alone = {method: {**result["everywhere"][method], "retention": {}, "refused": {}, "task_loss_added": None}}
        cells = [{"fine_tune": "gsm8k", "method": method}]
        page = page_of({"everywhere": alone, "together": alone, "cells": cells, "drift": {"rows": []}}, tmp_path)
        assert "Fine-tune by fine-tune" in headings(page)
        assert "Where a rival wins" not in headings(page)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the driver's pipes
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (.ci/run installs it)")
def test_the_page_in_a_browser(tmp_path: Path, result: dict[str, Any]) -> None:
    result["base"] = "/a/very/long/path/" + "x" * 120
    page_of(result, tmp_path)
    with shown(tmp_path / "bench.html") as page:
        assert page.locator("svg").count() > 0
