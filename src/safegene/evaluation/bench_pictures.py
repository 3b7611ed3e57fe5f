"""The pictures of the bench: safety against over-refusal, safety by fine-tune, drift against what is lost without calibration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from safegene.evaluation.bench_findings import (
    NOT_SERVED,
    OURS,
    PLAIN,
    Share,
    answer_shares,
    mean_share,
    names_of,
    titled,
    uses_of,
)
from safegene.evaluation.bench_tables import BASE, HARMLESS
from safegene.evaluation.plots import COLOURS, GREY, figure_of, svg_of

SHOWN = ((PLAIN, GREY), (OURS, COLOURS[0]), ("fold", COLOURS[1]))
"""The methods that are put to every fine-tune, with their colours."""


def drawn_name(name: str) -> str:
    """A name as matplotlib draws it: no formula, not too long."""
    return (name if len(name) <= 40 else name[:39] + "…").replace("$", r"\$")


def error_bars(shares: Sequence[Share]) -> list[list[float]]:
    """Lengths of the error bars, below and above; rounding must not make one negative."""
    return [
        [max(0.0, 100 * (r["value"] - r["low"])) for r in shares],
        [max(0.0, 100 * (r["high"] - r["value"])) for r in shares],
    ]


def label_points(figure: Any, axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """A name beside each point, at the nearest place where it covers no point and no other name, with a line if that is not
    close by."""
    figure.draw_without_rendering()  # only then is it known where the axes lie
    scale = 72 / figure.dpi  # everything below in points
    width, height = axes.bbox.width * scale, axes.bbox.height * scale
    found = [(axes.transData.transform((x, y)) - axes.bbox.min) * scale for _, x, y in points]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in found]
    for (name, x, y), (at_x, at_y) in zip(points, found, strict=True):
        wide, tall = 4.9 * len(drawn_name(name)), 9.0
        places = []
        for far, degrees in itertools.product((7, 14, 22, 32, 44, 58, 74), (40, -40, 140, -140, 0, 180, 90, -90)):
            right, up = far * math.cos(math.radians(degrees)), far * math.sin(math.radians(degrees))
            side, share = (
                ("center", 0.5) if abs(degrees) == 90 else ("left", 0.0) if abs(degrees) < 90 else ("right", 1.0)
            )
            left, low = at_x + right - share * wide, at_y + up - tall / 2
            places.append((far, right, up, side, (left, low, left + wide, low + tall)))
        inside = [p for p in places if min(p[4][:2]) >= 0 and p[4][2] <= width and p[4][3] <= height]
        free = (p for p in inside if not any(_overlap(p[4], other) for other in taken))
        far, right, up, side, box = next(free, places[0])
        taken.append(box)
        line = {"arrowstyle": "-", "color": "#888", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3} if far > 7 else None
        axes.annotate(drawn_name(name), (x, y), (right, up), textcoords="offset points", ha=side, va="center", fontsize=8,
                      arrowprops=line)  # fmt: skip


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two boxes (left, low, right, high) share any of their area."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def scatter(together: dict[str, Any]) -> str:
    """Safety score against harmless requests not served, means over the shared fine-tunes, a labelled point a method; "" where there
    are none."""
    points = []
    for method, s in together.items():
        safe, denied = mean_share(s.get("safety") or {}), mean_share(answer_shares(s, HARMLESS, *NOT_SERVED))
        if safe and denied:
            kind = 0 if method == OURS else 2 if (s.get("cost") or {}).get("gradient_steps") else 1
            points.append((method, denied, safe, kind))
    if not points:
        return ""
    figure, axes = figure_of(7.5, 5.5)
    styles = (
        ("the adapter", "D", COLOURS[1]),
        ("no training per fine-tune", "o", COLOURS[0]),
        ("trained for each fine-tune", "s", COLOURS[2]),
    )
    for kind, (label, marker, colour) in enumerate(styles):
        for i, (_, x, y, _) in enumerate(p for p in points if p[3] == kind):
            axes.errorbar(100 * x["value"], 100 * y["value"], xerr=error_bars([x]), yerr=error_bars([y]), fmt=marker, color=colour,
                          elinewidth=0.5, label=label if i == 0 else None)  # fmt: skip
    axes.set(xlabel="harmless requests refused or answered with nonsense, %", ylabel="safety score, %")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    label_points(figure, axes, [(method, 100 * x["value"], 100 * y["value"]) for method, x, y, _ in points])
    return svg_of(figure)


def bars(result: dict[str, Any]) -> str:
    """Safety score of every fine-tune by itself, with the adapter and folded, beside the level of base and adapter."""
    everywhere = result.get("everywhere") or {}
    shown = [(m, colour, s) for m, colour in SHOWN if (s := everywhere.get(m) or {}).get("safety")]
    names, uses = names_of(result, [s for _, _, s in shown]), uses_of(result)
    if not names:
        return ""
    places: dict[str, float] = {}
    down, before = 0.0, uses.get(names[0])
    for name in names:
        down -= 1.0 if uses.get(name) == before else 1.5
        places[name], before = down, uses.get(name)
    figure, axes = figure_of(7.5, (0.2 * len(shown) + 0.12) * -down + 1.3)
    thick = 0.84 / len(shown)
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    for i, (method, colour, s) in enumerate(shown):
        rates = {name: r for name, r in s["safety"].items() if r}
        ys = [places[name] + (len(shown) / 2 - 0.5 - i) * thick for name in rates]
        axes.barh(
            ys, [100 * r["value"] for r in rates.values()], thick * 0.92, color=colour, label=method,
            xerr=error_bars(list(rates.values())), error_kw={"elinewidth": 0.8},
        )  # fmt: skip
        for y, (name, r) in zip(ys, rates.items(), strict=True):
            refused = ", refused to attach" if name in (s.get("refused_to_attach") or []) else ""
            axes.text(100 * r["high"] + 1.5, y, f"{100 * r['value']:.0f}{refused}", va="center", fontsize=7, bbox=white)
    if level := ((everywhere.get(OURS) or {}).get("safety") or {}).get(BASE):
        axes.axvspan(100 * level["low"], 100 * level["high"], color="#000", alpha=0.08, linewidth=0)
        reached = f"base + adapter, {100 * level['value']:.0f} %"
        axes.axvline(100 * level["value"], color="#333", linestyle="--", linewidth=1, label=reached)
    axes.set(xlim=(0, 112), ylim=(down - 0.7, -0.3), xlabel="safety score, %, with 95 % interval")
    axes.set_xticks(range(0, 101, 20))
    axes.set_yticks(list(places.values()), [drawn_name(titled(name, uses)) for name in places])
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return svg_of(figure)


def drift_picture(rows: Sequence[dict[str, Any]], uses: dict[str, str]) -> str:
    """Reported drift against the retention lost without calibration, a labelled point a fine-tune; "" where there are none."""
    if not rows:
        return ""
    figure, axes = figure_of(7.5, 5.5)
    development = [r for r in rows if uses.get(r["fine_tune"]) == "development"]
    layers: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
        ("test", [r for r in rows if r not in development], {"marker": "o", "color": COLOURS[0]}),
        ("development", development, {"marker": "s", "facecolors": "none", "edgecolors": COLOURS[2]}),
        ("attachment refused", [r for r in rows if r["refused"]], {"marker": "x", "s": 120, "color": COLOURS[1]}),
    ]
    for label, chosen, style in layers:
        if chosen:
            axes.scatter(
                [r["drift"] for r in chosen], [100 * r["lost"] for r in chosen], label=label, zorder=3, **style
            )
    axes.axhline(0, color="#888", linewidth=0.8)
    axes.set(
        xlabel="reported drift, standard deviations of the base", ylabel="retention lost without calibration, points"
    )
    axes.margins(0.1)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    label_points(figure, axes, [(r["fine_tune"], r["drift"], 100 * r["lost"]) for r in rows])
    return svg_of(figure)
