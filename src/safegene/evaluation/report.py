"""The demo's result as one self-contained HTML page."""

from __future__ import annotations

import io
from pathlib import Path

import jinja2
import matplotlib

from safegene.evaluation.demo import DemoResult

matplotlib.use("Agg")

_PAGE = jinja2.Environment(autoescape=True).from_string("""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>SafeGene demo</title>
<style>body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}
table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #ccc;padding:.4rem;text-align:left;vertical-align:top}
svg{max-width:100%;height:auto}summary{cursor:pointer}pre{white-space:pre-wrap;margin:.2rem 0}</style>
<h1>{{ r.model }}: safety back on a fine-tune</h1>
<p>The adapter has {{ '%.3f' % (100 * r.parameter_share) }} % of the model's parameters and was attached in
{{ '%.1f' % r.attach_seconds }} s, without training. Retention
{{ '%.1f %%' % (100 * r.retention) if r.retention is not none else 'not defined' }}; recovery
{{ '%.1f %%' % (100 * r.recovery) if r.recovery is not none else 'not printed (the fine-tune lost under 10 points)' }}.</p>
{{ plot|safe }}
<table><tr><th>variant<th>safety score<th>over-refusal<th>task loss</tr>
{% for row in r.rows %}<tr><td>{{ row.variant }}<td>{{ row.safety_score }}<td>{{ row.over_refusal }}<td>{{ '%.4f' % row.task_loss }}</tr>
{% endfor %}</table>
<p>Overhead on this machine, batch 1: {% for k, o in r.overhead.items() %}{{ k }} {{ '%+.1f %% [%+.1f, %+.1f]' %
(100 * o.value, 100 * o.low, 100 * o.high) }} ({{ o.n }} pairs){{ '; ' if not loop.last }}{% endfor %}.
Whole demo {{ '%.0f' % r.seconds }} s. Intervals are 95 %. The judge is the offline rule judge.</p>
<h2>Answers</h2><p>What the fine-tune says without the adapter is folded away.</p>
{% for e in r.examples %}<h3>{{ e.prompt }}</h3><p><b>fine-tune + adapter</b></p><pre>{{ e['fine-tune+adapter'] }}</pre>
<details><summary>base, and fine-tune without adapter</summary><pre>base: {{ e.base }}</pre><pre>fine-tune: {{ e['fine-tune'] }}</pre></details>
{% endfor %}</html>""")


def plot(result: DemoResult) -> str:
    """Safety score and over-refusal of the four variants with intervals, as inline SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    for offset, name, colour in ((-0.2, "safety_score", "#0072b2"), (0.2, "over_refusal", "#d55e00")):
        rates = [getattr(row, name) for row in result.rows]
        values = [100 * rate.value for rate in rates]
        errors = [[100 * (r.value - r.low) for r in rates], [100 * (r.high - r.value) for r in rates]]
        places = [i + offset for i in range(len(rates))]
        axes.bar(places, values, 0.38, yerr=errors, capsize=3, color=colour, label=name.replace("_", " "))
        for x, value in zip(places, values, strict=True):
            axes.annotate(f"{value:.0f}", (x - 0.17, value + 1), fontsize=8)
    axes.set_xticks(range(len(result.rows)), [row.variant for row in result.rows])
    axes.set_ylabel("% of prompts")
    axes.set_ylim(0, 109)
    axes.legend(frameon=False, loc="upper left", ncols=2, bbox_to_anchor=(0, 1.13))
    axes.spines[["top", "right"]].set_visible(False)
    out = io.StringIO()
    figure.savefig(out, format="svg")
    text = out.getvalue()
    return text[text.index("<svg") :]


def write(result: DemoResult, path: Path) -> None:
    """Write the page."""
    path.write_text(_PAGE.render(r=result, plot=plot(result)), encoding="utf-8")
