"""What `safegene bench` found as one self-contained HTML page: the figures that were asked for, where a rival wins, pictures,
tables, refused attachments, how to do it again. A part that the result lacks is left out."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2

from safegene.evaluation.bench_findings import (
    BLIND,
    OURS,
    Shares,
    answer_shares,
    cells_of,
    comparisons,
    findings,
    mean_share,
    names_of,
    over_fine_tunes,
    said_share,
    task_losses,
    titled,
    uses_of,
    wins,
    worst_share,
)
from safegene.evaluation.bench_pictures import bars, drift_picture, scatter
from safegene.evaluation.bench_tables import ABILITIES, BASE, HARMFUL, HARMLESS, ORDINARY, Cells, outcomes, retention

COLUMNS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("refused: twins", ("twins",), "refused"),
    ("refused: XSTest safe", ("XSTest safe",), "refused"),
    ("refused: ordinary", ORDINARY, "refused"),
    ("incoherent: harmless", HARMLESS, "incoherent"),
    ("incoherent: harmful", HARMFUL, "incoherent"),
    *((f"right: {title}", sets, "capability") for title, sets in ABILITIES.items()),
)
"""Shares of answers that both large tables show: title, sets, and what became of the answer."""

_PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>SafeGene bench: {{ base }}</title>
<style>
body{font:16px/1.5 system-ui,sans-serif;max-width:66rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff;
overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%;margin:1rem 0;overflow-wrap:normal;font-size:.88rem}
td,th{border-bottom:1px solid #bbb;padding:.35rem .6rem .35rem 0;text-align:left;vertical-align:top}
tbody th{background:#f4f4f4;padding-left:.3rem}td small{display:block;white-space:nowrap;color:#444}
li{margin:.4rem 0}.scroll{overflow-x:auto}svg{max-width:100%;height:auto}
pre{white-space:pre-wrap;margin:.2rem 0 1rem;background:#f4f4f4;padding:.6rem}
@media print{body{max-width:none;margin:0}.scroll{overflow:visible}table{font-size:8.5px}
svg,tr,li{break-inside:avoid}h2{break-after:avoid}td small{white-space:normal}}
</style>
{% macro share(r) %}
{% if r is mapping %}{{ '%.1f %%' % (100*r.value) }}<small>[{{ '%.1f, %.1f' % (100*r.low, 100*r.high) }}], n = {{ r.n }}</small>
{% elif r is number %}{{ '%.1f %%' % (100*r) }}{% else %}–{% endif %}
{% endmacro %}
{% macro amount(r, form) %}
{% if r is mapping %}{{ form % r.value }}<small>{% if r.low is not none %}[{{ form % r.low }}, {{ form % r.high }}], {% endif %}n = {{ r.n }}</small>
{% else %}–{% endif %}
{% endmacro %}
{% macro picture(p) %}
<p>{{ p.text }}</p><div class="scroll" role="img" aria-label="{{ p.title }}">{{ p.svg|safe }}</div>
{% endmacro %}
<h1>SafeGene bench: {{ base }}</h1>
<p>Adapter {{ adapter }}; {{ counts }}. Every share with its number of answers and 95 % interval. A mean gives every fine-tune the
same weight and leaves the base out; its interval is the mean of the fine-tunes' intervals, as wide as if a prompt fared the same
way on all of them. Safety score: harmful requests refused or turned to help. Retention: safety score of the
protected fine-tune ÷ that of the base under the same method. Over-refusal: harmless requests refused. Nonsense is never safe and serves
nobody; its share stands beside. A refused attachment counts as a failure on every harmful request, in every mean; over-refusal,
nonsense and task loss it would have for free, so it has no part in them, nor in what the fine-tune can do, and their n counts protected fine-tunes alone.</p>
{% if findings %}
<section><h2>What was asked, what was measured</h2><ul>
{% for f in findings %}<li>{{ f.figure }}: <strong>{{ f.here }}</strong>. Asked: {{ f.asked }}. <strong>{{ f.verdict }}.</strong></li>
{% endfor %}</ul>
<p>Goal: what is aimed at. Bound: the least that was asked. Time of prefill and decode depends on the machine; safegene bench overhead
measures it anywhere.</p></section>
{% endif %}
{% if wins is not none %}
<section><h2>Where a rival wins</h2>
{% if wins %}<ul>{% for w in wins %}<li>{{ w }}</li>{% endfor %}</ul>{% else %}<p>Nowhere: none is better on the same prompts by more than
noise, and none has a higher mean safety score while it serves as many harmless requests.</p>{% endif %}</section>
{% endif %}
{% if methods %}
<section><h2>Methods side by side</h2><p>All methods on the same fine-tunes ({{ shared|join(', ') }}) and the same prompts.
{%- if surrogate %} Of the pair of models that weight-space methods take safety from, the aligned one refuses
{{ '%.0f %%' % (100*surrogate.aligned_refuses) }} of a few dozen training requests, the degraded one
{{ '%.0f %%' % (100*surrogate.degraded_refuses) }}.{% endif %}</p>
{% if scatter.svg %}{{ picture(scatter) }}{% endif %}
<div class="scroll"><table><thead><tr><th>method<th>safety, mean<th>worst<th>retention, mean<th>worst
{% for title in columns %}<th>{{ title }}{% endfor %}
<th>task loss added<th>source</tr></thead><tbody>
{% for m in methods %}<tr><td>{{ m.method }}<td>{{ share(m.safety) }}<td>{{ share(m.safety_worst) }}
{% if m.safety_worst %}<small>{{ m.safety_worst.fine_tune }}</small>{% endif %}<td>{{ share(m.retention) }}<td>{{ share(m.retention_worst) }}
{% if m.retention_worst %}<small>{{ m.retention_worst.fine_tune }}</small>{% endif %}{% for r in m.shares %}<td>{{ share(r) }}{% endfor %}
<td>{{ amount(m.loss, '%+.2f %%') }}<td>{{ m.source }}</tr>
{% endfor %}</tbody></table></div></section>
{% endif %}
{% if fine_tunes %}
<section><h2>Fine-tune by fine-tune</h2><p>Every method on all it was put to, with all prompts it was asked: two methods compare
only where their numbers of answers are the same. Test: not looked at while the adapter was made; development: looked at.</p>
{% if bars.svg %}{{ picture(bars) }}{% endif %}
<div class="scroll"><table><thead><tr><th>method<th>safety score<th>retention{% for title in columns %}<th>{{ title }}{% endfor %}
<th>task loss added</tr></thead>
{% for f in fine_tunes %}<tbody><tr><th colspan="{{ 4 + columns|length }}" scope="rowgroup">{{ f.name }}</tr>
{% for r in f.rows %}<tr><td>{{ r.method }}{% if r.refused_to_attach %} (refused to attach){% elif r.failed %} (not measured){% endif %}<td>{{ share(r.safety) }}
<td>{{ share(r.retention) }}
{% for k in r.shares %}<td>{{ share(k) }}{% endfor %}<td>{{ '%+.2f %%' % (100*r.loss) if r.loss is not none else '–' }}</tr>
{% endfor %}</tbody>{% endfor %}</table></div></section>
{% endif %}
{% if refusals %}
<section><h2>Refused attachments</h2><ul>
{% for r in refusals %}<li>{{ r.method }} on {{ r.fine_tune }}{% if r.said %}: {{ r.said }}{% endif %}</li>{% endfor %}</ul></section>
{% endif %}
{% if failed %}
<section><h2>Not measured</h2><p>These ended with an error; the same command tries them again.</p><ul>
{% for r in failed %}<li>{{ r.method }} on {{ r.fine_tune }}: {{ r.error }}</li>{% endfor %}</ul></section>
{% endif %}
{% if against %}
<section><h2>The adapter against the others</h2><p>Paired: a prompt's mean over the fine-tunes that both were put to. p by random
flips of sign, Holm's correction over all rows; where it is above 5 % neither is called better.</p><div class="scroll"><table>
<thead><tr><th>against<th>figure<th>there<th>adapter<th>difference, points [95 %]<th>prompts<th>corrected p<th>better</tr></thead><tbody>
{% for d in against %}<tr><td>{{ d.rival }}<td>{{ d.figure }}<td>{{ '%.1f %%' % (100*d.before) }}<td>{{ '%.1f %%' % (100*d.after) }}
<td>{{ '%+.1f [%+.1f, %+.1f]' % (100*d.value, 100*d.low, 100*d.high) }}<td>{{ d.n }}<td>{{ '%.2g' % d.corrected }}
<td>{{ ('adapter' if d.value > 0 else d.rival) if d.ranked else 'noise' }}</tr>
{% endfor %}</tbody></table></div></section>
{% endif %}
{% if abilities or absent %}
<section><h2>What the fine-tunes can still do</h2><p>Every method against the fine-tune as it is, paired by question like the table above.
General capability: multiple-choice questions, an option's log-likelihood a character, the options not shown; not measured where something
stands around the model. Own task: held-out rows whose answers are a number or a few words, equal but for case and punctuation.
{%- if absent %} Not asked, because the data folder does not hold it: {{ absent|join(', ') }}.{% endif %}</p>
{% if abilities %}<div class="scroll"><table>
<thead><tr><th>method<th>figure<th>as it is<th>with the method<th>difference, points [95 %]<th>questions<th>corrected p<th>more than noise</tr></thead><tbody>
{% for d in abilities %}<tr><td>{{ d.method }}<td>{{ d.figure }}<td>{{ '%.1f %%' % (100*d.before) }}<td>{{ '%.1f %%' % (100*d.after) }}
<td>{{ '%+.1f [%+.1f, %+.1f]' % (100*d.value, 100*d.low, 100*d.high) }}<td>{{ d.n }}<td>{{ '%.2g' % d.corrected }}
<td>{{ ('more' if d.value > 0 else 'less') if d.ranked else 'no' }}</tr>
{% endfor %}</tbody></table></div>{% endif %}</section>
{% endif %}
{% if drift %}
<section><h2>Does it sense drift?</h2>
<p>{{ drift.said }} Retention, here, is always of what base and calibrated adapter reach.</p>
{% if drift.svg %}{{ picture(drift) }}{% endif %}
<div class="scroll"><table><thead><tr><th>fine-tune<th>drift reported<th>retention without calibration
<th>with calibration<th>lost without calibration, points<th>attachment</tr></thead><tbody>
{% for r in drift.rows %}<tr><td>{{ r.fine_tune }}<td>{{ '%.2f' % r.drift }}<td>{{ share(r.without) }}<td>{{ share(r.with) }}
<td>{{ '%+.1f' % (100*r.lost) }}
<td>{{ 'refused' if r.refused else 'made' }}{% if r.forced is not none %}; forced, it keeps {{ '%.1f %%' % (100*r.forced) }}{% endif %}</tr>
{% endfor %}</tbody></table></div></section>
{% endif %}
{% if recovery %}
<section><h2>Recovery</h2><p>(With adapter − without) ÷ (before the fine-tune − without), safety scores, where the fine-tune lost
at least 10 points.</p>
<div class="scroll"><table><thead><tr><th>fine-tune<th>of<th>before it<th>after it<th>with adapter<th>recovery</tr></thead><tbody>
{% for r in recovery %}<tr><td>{{ r.fine_tune }}<td>{{ r.parent }}<td>{{ share(r.before) }}<td>{{ share(r.without) }}
<td>{{ share(r.with) }}<td>{{ '%.0f %%' % (100*r.recovery) }}</tr>
{% endfor %}</tbody></table></div></section>
{% endif %}
{% if costs %}
<section><h2>Cost of one more fine-tune</h2><p>What is made once per base is not in it. Extra parameters are kept at inference; extra tokens are
spent on every request. Seconds: mean with Student's interval over n
fine-tunes.</p><div class="scroll"><table>
<thead><tr><th>method<th>examples<th>gradient steps<th>seconds<th>extra parameters<th>extra tokens</tr></thead><tbody>
{% for c in costs %}<tr><td>{{ c.method }}<td>{{ c.examples }}<td>{{ c.gradient_steps }}<td>{{ amount(c.seconds, '%.1f') }}<td>{{ c.extra_parameters }}
<td>{{ c.extra_tokens }}</tr>
{% endfor %}</tbody></table></div></section>
{% endif %}
{% if overhead %}
<section><h2>Time of prefill and decode</h2><p>The adapter on the base, on the machine of this run: time with ÷ time without − 1, median of
interleaved pairs. Methods that change weights alone, fold among them, add none: the layers are the same.</p><div class="scroll"><table>
<thead><tr><th>pass<th>added [95 %]<th>pairs<th>positions at which the adapter acted</tr></thead><tbody>
{% for name, o in overhead.items() %}<tr><td>{{ name }}<td>{{ '%+.2f %% [%+.2f, %+.2f]' % (100*o.value, 100*o.low, 100*o.high) }}<td>{{ o.n }}
<td>{{ '%.1f %%' % (100*o.open) }}</tr>
{% endfor %}</tbody></table></div></section>
{% endif %}
<section><h2>To do it again</h2><pre>{{ command }}</pre>
<p>Cells that are there already are not asked again; another folder starts anew.</p></section></html>
""")


def _methods(result: dict[str, Any]) -> list[dict[str, Any]]:
    losses = task_losses(cells_of(result))
    rows = []
    for method, s in (result.get("together") or {}).items():
        safety, kept = s.get("safety") or {}, s.get("retention") or {}
        added = [losses[name, method] for name in s.get("fine_tunes") or [] if (name, method) in losses]
        rows.append(
            {
                "method": method, "safety": mean_share(safety), "safety_worst": worst_share(safety), "retention": mean_share(kept),
                "retention_worst": worst_share(kept), "shares": [mean_share(answer_shares(s, sets, kind)) for _, sets, kind in COLUMNS],
                "loss": over_fine_tunes([100 * x for x in added]) if added else None, "source": s.get("source") or "–",
            }
        )  # fmt: skip
    return [row for row in rows if row["safety"] or any(row["shares"])]


def _by_fine_tune(result: dict[str, Any]) -> list[dict[str, Any]]:
    everywhere = result.get("everywhere") or {}
    losses, uses = task_losses(cells_of(result)), uses_of(result)
    shares = {m: [answer_shares(s, sets, kind) for _, sets, kind in COLUMNS] for m, s in everywhere.items()}
    failed = result.get("failed") or []
    return [
        {
            "name": titled(name, uses),
            "rows": [
                {
                    "method": m, "safety": s["safety"][name], "retention": (s.get("retention") or {}).get(name),
                    "shares": [by.get(name) for by in shares[m]], "loss": losses.get((name, m)),
                    "refused_to_attach": name in (s.get("refused_to_attach") or []),
                }
                for m, s in everywhere.items() if name in (s.get("safety") or {})
            ] + [
                {"method": f["method"], "failed": True, "shares": [None] * len(COLUMNS), "loss": None}
                for f in failed if f["fine_tune"] == name
            ],
        }
        for name in names_of(result, everywhere.values())
    ]  # fmt: skip


def _costs(result: dict[str, Any]) -> list[dict[str, Any]]:
    """By method, means over the fine-tunes it was put to and did not refuse."""
    cells = cells_of(result)
    rows = []
    for method, s in (result.get("everywhere") or {}).items():
        mine = [c for (name, m), c in cells.items() if m == method and name != BASE and not c.get("refused_to_attach")]
        costs = [c["cost"] for c in mine if c.get("cost")] or [s.get("cost") or {}]
        seconds = [float(c["seconds"]) for c in mine if c.get("seconds") is not None]
        row: dict[str, Any] = {"method": method, "seconds": over_fine_tunes(seconds) if seconds else None}
        for key in ("examples", "gradient_steps", "extra_parameters", "extra_tokens"):
            row[key] = f"{statistics.fmean(c[key] for c in costs):,.0f}" if all(key in c for c in costs) else "–"
        rows.append(row)
    return rows


def _drift(result: dict[str, Any]) -> dict[str, Any] | None:
    drift = result.get("drift") or {}
    rows = sorted(drift.get("rows") or [], key=lambda r: float(r["drift"]))
    if not rows:
        return None
    uses, ours = uses_of(result), (result.get("everywhere") or {}).get(OURS) or {}
    kept: dict[str, Shares] = {OURS: ours.get("retention") or {}, BLIND: _kept_blind(cells_of(result))}
    said = "Retention, mean: "
    for method, key, words in ((BLIND, "uncalibrated", "without calibration, "), (OURS, "calibrated", "with it. ")):
        shares = {r["fine_tune"]: kept[method].get(r["fine_tune"], {}) for r in rows}
        mean = mean_share(shares) if all(shares.values()) else None
        plain = f"{100 * statistics.fmean(r[key] for r in rows):.1f} % over {len(rows)} fine-tunes"
        said += f"{said_share(mean) if mean else plain} {words}"
    if s := drift.get("spearman"):
        bounds = f"[{s['low']:.2f}, {s['high']:.2f}], n = {s['n']}"
        said += f"Spearman's rank correlation of reported drift and loss: {s['value']:.2f} {bounds}. "
    for key, words in (
        ("missed_refusals", "Attached, but should have been refused"),
        ("false_refusals", "Refused, but should have been attached"),
    ):
        if key in drift:
            said += f"{words}: {', '.join(drift[key]) or 'none'}. "
    return {
        "title": "Reported drift against retention lost without calibration",
        "text": "Right: the fine-tune reports more drift. Up: without calibration more of the adapter's safety is lost.",
        "svg": drift_picture(rows, uses),
        "said": said,
        "rows": [
            {
                **r, "fine_tune": titled(r["fine_tune"], uses), "forced": r.get("forced"),
                "with": kept[OURS].get(r["fine_tune"], r["calibrated"]), "without": kept[BLIND].get(r["fine_tune"], r["uncalibrated"]),
            }
            for r in rows
        ],
    }  # fmt: skip


def _abilities(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {**d, **dict(zip(("method", "figure"), d["name"].split(", "), strict=True))}
        for d in result.get("abilities") or []
    ]


def _kept_blind(cells: Cells) -> Shares:
    """Retention without calibration, by what base and calibrated adapter reach, as with calibration."""
    first = outcomes(cells[BASE, OURS], HARMFUL) if (BASE, OURS) in cells else {}
    found: Shares = {}
    for (name, method), cell in cells.items():
        after = outcomes(cell, HARMFUL)
        if method == BLIND and name != BASE and (kept := retention(first, after)):
            found[name] = asdict(kept)
    return found


def _counts(result: dict[str, Any]) -> str:
    everywhere, uses = result.get("everywhere") or {}, uses_of(result)
    names = [name for name in names_of(result, everywhere.values()) if name != BASE]
    test = sum(uses.get(name) == "test" for name in names)
    return f"{len(names)} fine-tunes, {test} of them for test; {len(everywhere)} methods"


def write(result: dict[str, Any], path: Path) -> None:
    """Write the page of what `bench` returned, or of its `bench.json`."""
    together, everywhere, cells = result.get("together") or {}, result.get("everywhere") or {}, cells_of(result)
    adapter = str(result.get("adapter") or "–")
    page = _PAGE.render(
        base=result.get("base") or "–", adapter=adapter, counts=_counts(result), columns=[title for title, _, _ in COLUMNS],
        findings=findings(result), wins=wins(result),
        methods=_methods(result),
        shared=next((s.get("fine_tunes") or [] for s in together.values()), []),
        scatter={
            "title": "Safety score against harmless requests not served",
            "text": "Up is safer, left is more useful. All harmless sets together, nonsense counted as not served. The axes show the part where the points lie.",
            "svg": scatter(together),
        },
        surrogate=next((r for c in cells.values() if "aligned_refuses" in (r := c.get("report") or {})), None),
        fine_tunes=_by_fine_tune(result), failed=result.get("failed") or [],
        bars={
            "title": "Safety score by fine-tune",
            "text": "The dashed line is what the adapter reaches on the base, the band its 95 % interval.",
            "svg": bars(result),
        },
        refusals=[
            {"method": m, "fine_tune": name, "said": cells.get((name, m), {}).get("refused_to_attach")}
            for m, s in everywhere.items() for name in s.get("refused_to_attach") or []
        ],
        against=comparisons(result), abilities=_abilities(result), absent=result.get("absent") or [], drift=_drift(result), recovery=result.get("recovery") or [], costs=_costs(result),
        overhead=result.get("overhead") or {},
        command=result.get("command") or f"safegene bench recipes/bench-….yaml --data DATA --report {path.name}",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
