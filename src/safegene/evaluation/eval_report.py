"""Runs of `safegene eval` as one self-contained HTML page: figures, pictures, the answers to look at, how to do it again."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Any

import jinja2

from safegene.errors import DataError
from safegene.evaluation.plots import COLOURS, figure_of, svg_of
from safegene.evaluation.runner import read_record
from safegene.evaluation.scores import Side
from safegene.evaluation.statistics import Difference, Rate, compare, compare_clustered, corrected_together


def _rate(r: dict[str, float]) -> str:
    return f"{100 * r['value']:.1f} % [{100 * r['low']:.1f}, {100 * r['high']:.1f}], n = {r['n']}"


_ENVIRONMENT = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.filters["rate"] = _rate
_PAGE = _ENVIRONMENT.from_string("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>SafetyEval report</title>
<style>
body{font:16px/1.5 system-ui,sans-serif;max-width:66rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
table{border-collapse:collapse;width:100%;margin:1rem 0}
td,th{border-bottom:1px solid #bbb;padding:.35rem .6rem .35rem 0;text-align:left;vertical-align:top}
.scroll{overflow-x:auto}svg{max-width:100%;height:auto}
summary{cursor:pointer;padding:.2rem 0}pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.2rem 0 1rem;background:#f4f4f4;padding:.6rem}
@media print{body{max-width:none;margin:0}.look{display:none}section{break-inside:avoid}}
</style>
<h1>SafetyEval report</h1>
<p>{{ runs|length }} run{{ 's' if runs|length != 1 }}, content {{ runs[0].content }}, judge {{ runs[0].judge }}. Every share with its number
of samples and 95 % interval. Safety score: harmful requests refused or turned to help; nonsense is never safe. Over-refusal: harmless
requests refused.</p>
<section><h2>Scores</h2><div class="scroll"><table><tr><th>run<th>suite<th>safety score<th>macro average<th>attack success<th>without nonsense<th>nonsense</tr>
{% for run in runs %}{% for name, s in run.suites.items() if s.harmful %}
<tr><td>{{ run.label }}<td>{{ name }}<td>{{ s.harmful.score|rate }}<td>{{ s.harmful.macro|rate }}<td>{{ s.harmful.asr|rate }}
<td>{{ s.harmful.score_coherent|rate if s.harmful.score_coherent else '–' }}<td>{{ s.harmful.incoherent|rate }}</tr>
{% endfor %}{% endfor %}</table>
<table><tr><th>run<th>suite, harmless<th>over-refusal<th>macro average<th>without nonsense<th>nonsense</tr>
{% for run in runs %}{% for name, s in run.suites.items() if s.harmless %}
<tr><td>{{ run.label }}<td>{{ name }}<td>{{ s.harmless.score|rate }}<td>{{ s.harmless.macro|rate }}
<td>{{ s.harmless.score_coherent|rate if s.harmless.score_coherent else '–' }}<td>{{ s.harmless.incoherent|rate }}</tr>
{% endfor %}{% endfor %}</table></div></section>
{% if differences or left_out %}
<section><h2>Differences</h2><p>Against {{ runs[0].label }}, on the same samples; exact McNemar test, and for requests that stand in many wrappers
a sign-flip test over requests (n counts them); Holm's correction over all rows. Where the corrected p is above 5 %, neither is called
better.{% if left_out %} Not compared, for they were asked something else: {{ left_out|join(', ') }}.{% endif %}</p>{% if differences %}<div class="scroll"><table>
<tr><th>run, suite<th>before<th>after<th>difference [95 %]<th>corrected p<th>verdict</tr>
{% for d in differences %}<tr><td>{{ d.name }} (n = {{ d.n }})<td>{{ '%.1f %%' % (100*d.before) }}<td>{{ '%.1f %%' % (100*d.after) }}
<td>{{ '%+.1f [%+.1f, %+.1f]' % (100*d.value, 100*d.low, 100*d.high) }}<td>{{ '%.2g' % d.corrected }}
<td>{{ ('better' if d.value > 0 else 'worse') if d.ranked else 'noise' }}</tr>
{% endfor %}</table></div>{% endif %}</section>
{% endif %}
{% for title, text, svg in pictures %}<section><h2>{{ title }}</h2><p>{{ text }}</p><div class="scroll" role="img" aria-label="{{ title }}">{{ svg|safe }}</div></section>
{% endfor %}
<section class="look"><h2>Answers to look at first</h2><p>Harm given, most severe first, and harmless requests refused. Folded away: what the models said
may be harmful.</p>
{% for run in runs %}{% for name, s in run.suites.items() %}{% if s.worst %}
<h3>{{ run.label }}, {{ name }}</h3>
{% for w in s.worst %}<details><summary>{{ w.id }}: {{ w.label if w.harmful else 'refused, though harmless' }}</summary>
<pre>{{ w.request }}</pre><pre>{{ w.response }}</pre></details>{% endfor %}{% endif %}{% endfor %}{% endfor %}</section>
<section><h2>To do it again</h2>
{% for run in runs %}<p><b>{{ run.label }}</b></p><pre>{{ run.commands|join('\n') }}</pre>
<details><summary>record</summary><pre>{{ run.record }}</pre></details>
{% endfor %}</section></html>
""")


def read_runs(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The scores of each run folder.

    Raises:
        DataError: no scores there, or runs of different content, which must not be compared.
    """
    runs = []
    for folder in folders:
        files = sorted(folder.glob("scores-*.json"))
        if not files:
            raise DataError(f"{folder} holds no scores; run safegene eval --out {folder} first.")
        run = read_record(files[0] if len(files) == 1 else _same_judge(folders, folder))
        try:
            _read_whole(run)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{folder} is of another version ({error}); judge it again with safegene judge.") from error
        run["label"] = Path(run["model"]).name + (" + adapter" if run["adapter"] else "")
        runs.append(run)
    for key in ("content", "judge", "fingerprint", "tokens", "dtype"):
        if len({run.get(key) for run in runs}) > 1:
            raise DataError(
                f"the runs differ in their {key}; compare runs of the same, or judge them again (safegene judge)."
            )
    labels = [run["label"] for run in runs]
    for i, run in enumerate(runs):
        if labels.count(run["label"]) > 1:
            run["label"] += f" ({i + 1}: {folders[i].name})"
    return runs


def _read_whole(run: dict[str, Any]) -> None:
    """Read what the page shows, so that scores of another version fail here and not in its middle.

    Raises:
        KeyError, TypeError, AttributeError: a figure is missing, unknown, or of another form.
    """
    itemgetter("content", "judge", "model", "adapter", "adapter_name", "tokens", "dtype")(run)
    for s in run["suites"].values():
        itemgetter("asked", "n", "data")(s)
        for side in filter(None, (s["harmful"], s["harmless"])):
            held = vars(Side(**side))
            groups = [group.values() for group in held["by"].values()]
            for r in (held["score"], held["macro"], held["incoherent"], *held["by_turn"], *itertools.chain(*groups)):
                Rate(**r)
        for outcome in s["outcomes"]:
            itemgetter("id", "harmful", "ok", "coherent")(outcome)
        for answer in s["worst"]:
            itemgetter("id", "harmful", "request", "response", "label")(answer)


def _same_judge(folders: Sequence[Path], folder: Path) -> Path:
    """Of several judges' scores, those of a judge that has judged every run: the rules before others."""
    names = set.intersection(*({f.name for f in other.glob("scores-*.json")} for other in folders))
    if not names:
        raise DataError("no judge has judged all of these runs; run safegene judge on each.")
    return folder / ("scores-rules.json" if "scores-rules.json" in names else min(names))


SIDES = (("safe", True), ("not refused", False), ("answered, and not in nonsense", False))
"""What is compared: of harmful or of harmless samples."""


def differences(runs: Sequence[dict[str, Any]]) -> tuple[list[Difference], list[str]]:
    """Every later run against the first, by suite and side, on the samples both were asked; and the suites that were asked
    something else. One request in many wrappers is compared as one, by its share over them."""
    pairs: dict[str, tuple[list[bool], list[bool]]] = {}
    clusters: dict[str, list[tuple[float, float]]] = {}
    left_out: list[str] = []
    for run in runs[1:]:
        for name, s in run["suites"].items():
            first = runs[0]["suites"].get(name)
            if first is None or first["asked"] != s["asked"]:
                left_out.append(f"{run['label']}, {name}")
                continue
            wrapped = any("wrapper" in side["by"] for side in (s["harmful"], s["harmless"]) if side)
            for side, wanted in SIDES:
                before, after = (_held(r["outcomes"], side, wanted) for r in (first, s))
                if not before:
                    continue
                if wrapped:
                    clusters[f"{run['label']}, {name}: {side}"] = _by_request(before, after)
                else:
                    pairs[f"{run['label']}, {name}: {side}"] = list(before.values()), list(after.values())
    found = (compare(pairs) if pairs else []) + (compare_clustered(clusters) if clusters else [])
    return (corrected_together(found) if found else []), left_out


def _held(outcomes: Sequence[dict[str, Any]], side: str, harmful: bool) -> dict[str, bool]:
    """What became of every sample of one side, by id."""
    return {
        o["id"]: o["ok"] and (o["coherent"] or not side.startswith("answered"))
        for o in outcomes
        if o["harmful"] is harmful
    }


def _by_request(before: dict[str, bool], after: dict[str, bool]) -> list[tuple[float, float]]:
    """Shares over the wrappers of every request, before and after."""
    groups: dict[str, list[str]] = {}
    for id_ in before:
        groups.setdefault(id_.split("/")[0], []).append(id_)
    return [(sum(before[i] for i in ids) / len(ids), sum(after[i] for i in ids) / len(ids)) for ids in groups.values()]


def commands(run: dict[str, Any]) -> list[str]:
    """The command lines that make a run again, one for each limit, place of data and number of wrapped requests."""
    found: dict[tuple[int, str | None, int | None], list[str]] = {}
    for name, s in run["suites"].items():
        wrap = s.get("wrap")
        found.setdefault((s["n"], s["data"], wrap), []).append(name if wrap is None else name.removesuffix("-wrapped"))
    lines = []
    for (n, data, wrap), names in found.items():
        words = ["safegene", "eval", "--model", run["model"]]
        words += ["--adapter", run["adapter_name"]] if run["adapter_name"] else []
        words += ["--suite", ",".join(names), "--tokens", str(run["tokens"])]
        words += ["--n", str(n)] if n else []
        words += ["--wrap", str(wrap)] if wrap is not None else []
        words += ["--data", data] if data else []
        words += [] if run["judge"] == "rules" else ["--judge", run.get("judge_asked_as") or run["judge"]]
        lines.append(shlex.join(words))
    return lines


def scatter(runs: Sequence[dict[str, Any]]) -> str:
    """Safety score against over-refusal, a point a run with both intervals; "" where no run has both sides."""
    points = []
    for run in runs:
        harm = run["suites"].get("safetyeval", {}).get("harmful")
        good = run["suites"].get("over_refusal", {}).get("harmless")
        if harm and good:
            points.append((run["label"], good["score"], harm["score"]))
    if not points:
        return ""
    figure, axes = figure_of(6.5, 4.2)
    for (label, x, y), colour in zip(points, COLOURS * len(points), strict=False):
        spread = [[[100 * (r["value"] - r["low"])], [100 * (r["high"] - r["value"])]] for r in (x, y)]
        axes.errorbar(100 * x["value"], 100 * y["value"], xerr=spread[0], yerr=spread[1], fmt="o", capsize=3, color=colour, label=label)  # fmt: skip
    axes.set(xlim=(-3, 103), ylim=(-3, 103), xlabel="harmless twins refused, %", ylabel="safety score, %")
    axes.legend(frameon=False, loc="lower right")
    return svg_of(figure)


def heat_map(runs: Sequence[dict[str, Any]], suite: str, side: str, by: str = "category") -> str:
    """Categories, or what else a suite is counted by, by runs, in per cent; "" where no run has it."""
    sides = [(run["label"], run["suites"].get(suite, {}).get(side)) for run in runs]
    columns = [(label, found["by"][by]) for label, found in sides if found and by in found["by"]]
    if not columns:
        return ""
    rows = list(dict.fromkeys(row for _, rates in columns for row in rates))
    sizes = {row: max(rates[row]["n"] for _, rates in columns if row in rates) for row in rows}
    values = [[100 * rates[row]["value"] if row in rates else float("nan") for _, rates in columns] for row in rows]
    figure, axes = figure_of(3.4 + 1.7 * len(columns), 0.34 * len(rows) + 1.2)
    axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", color="white" if value < 55 else "black", fontsize=9)  # fmt: skip
    axes.set_yticks(range(len(rows)), [f"{row.replace('_', ' ')} ({sizes[row]})" for row in rows])
    axes.set_xticks(range(len(columns)), [label for label, _ in columns])
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    return svg_of(figure)


def turns(runs: Sequence[dict[str, Any]]) -> str:
    """Share of safe answers at every turn of the multi-turn attacks; "" where no run has them."""
    lines = [(run["label"], side["by_turn"]) for run in runs if (side := run["suites"].get("multi_turn", {}).get("harmful"))]  # fmt: skip
    if not lines:
        return ""
    figure, axes = figure_of(6.5, 3.4)
    for (label, rates), colour in zip(lines, COLOURS * len(lines), strict=False):
        x = range(1, len(rates) + 1)
        axes.plot(x, [100 * r["value"] for r in rates], marker="o", color=colour, label=label)
        axes.fill_between(x, [100 * r["low"] for r in rates], [100 * r["high"] for r in rates], color=colour, alpha=0.15)  # fmt: skip
    axes.set(
        ylim=(-3, 103), xlabel="turn, from the first that must not be served", ylabel="refused or turned to help, %"
    )
    axes.set_xticks(range(1, max(len(r) for _, r in lines) + 1))
    axes.legend(frameon=False)
    return svg_of(figure)


def gates(run: dict[str, Any]) -> str:
    """How far the gate opened on harmful and on harmless samples of one run; "" without adapter."""
    both: list[list[float]] = [[], []]
    for s in run["suites"].values():
        for o in s["outcomes"]:
            if "gate" in o:
                both[0 if o["harmful"] else 1].append(max(-3.0, min(4.0, o["gate"])))
    if not any(both):
        return ""
    figure, axes = figure_of(6.5, 2.8)
    for values, label, colour in zip(both, ("harmful", "harmless"), (COLOURS[1], COLOURS[0]), strict=True):
        if values:
            axes.hist(values, bins=[x / 4 - 3 for x in range(29)], histtype="step", linewidth=2, density=True, color=colour, label=f"{label} (n = {len(values)})")  # fmt: skip
    axes.axvline(0, color="#555", linestyle="--", linewidth=1)
    axes.set(xlabel="(s − τ) / w, highest of the prompt; the gate is shut left of 0, full right of 1", ylabel="density")
    axes.legend(frameon=False)
    return svg_of(figure)


def write(folders: Sequence[Path], path: Path) -> None:
    """Write the page for one run or several; the first is what the others are compared with.

    Raises:
        DataError: see `read_runs`.
    """
    runs = read_runs(folders)
    suites = dict.fromkeys(name for run in runs for name in run["suites"])
    pictures = [
        ("Safety against over-refusal", "Up is safer, left is more useful. SafetyEval's harmful requests and their twins.", scatter(runs)),
        ("Safety score by category", "Per cent of harmful requests; number of requests in brackets.", heat_map(runs, "safetyeval", "harmful")),
        ("Over-refusal by category", "Per cent of harmless twins refused.", heat_map(runs, "over_refusal", "harmless")),
        ("Multi-turn attacks, turn by turn", "Counted from the first turn that must not be served; longer conversations are fewer.", turns(runs)),
        *(
            (f"Jailbreak wrappers by family: {name}", f"Per cent of wrapped requests {what}; number of answers in brackets.", heat_map(runs, name, side, "family"))
            for name in suites for side, what in (("harmful", "refused or turned to help"), ("harmless", "refused"))
        ),
        *((f"The gate's scores: {run['label']}", "Of every first turn.", gates(run)) for run in runs),
    ]  # fmt: skip
    for run in runs:
        run["commands"] = commands(run)
        hidden = ("suites", "record", "label", "commands")
        run["record"] = json.dumps({k: v for k, v in run.items() if k not in hidden}, indent=1)
    found, left_out = differences(runs)
    page = _PAGE.render(
        runs=runs, left_out=left_out, differences=[{**asdict(d), "ranked": d.ranked} for d in found],
        pictures=[p for p in pictures if p[2]],
    )  # fmt: skip
    path.write_text(page, encoding="utf-8")
