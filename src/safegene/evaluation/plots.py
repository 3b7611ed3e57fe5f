"""Colours and figures that all pictures share, and the picture of the core results."""

from __future__ import annotations

import io
from typing import Any

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Okabe and Ito's, which people with any colour vision tell apart."""
BLUE, ORANGE, GREY = COLOURS[0], COLOURS[1], "#b8b8b8"


def svg_of(figure: Any) -> str:
    """The picture as SVG, without the XML head, to stand in a page."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def figure_of(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches and its axes, without a frame above and to the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _pooled(sets: dict[str, Any], key: str) -> tuple[float, float, float]:
    from statsmodels.stats.proportion import proportion_confint

    n = sum(s[key]["n"] for s in sets.values())
    hits = sum(round(s[key]["value"] * s[key]["n"]) for s in sets.values())
    low, high = proportion_confint(hits, n, method="wilson")
    return 100 * hits / n, 100 * float(low), 100 * float(high)


def core_svg(results: dict[str, Any], transfer_sets: tuple[str, ...]) -> str:
    """Safety score (left) and refused harmless requests (right) without and with the adapter, per variant, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.55 * len(results["variants"]) + 1.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    variants = list(results["variants"].items())[::-1]
    for axes, kind, sets, title in (
        (left, "harmful", transfer_sets, "harmful requests: safety score"),
        (right, "harmless", None, "harmless requests: refused (XSTest safe and ordinary)"),
    ):
        for place, (_, figures) in enumerate(variants):
            chosen = {k: v for k, v in figures[kind].items() if sets is None or k in sets}
            for offset, key, colour in ((0.19, "without", GREY), (-0.19, "with", BLUE if sets else ORANGE)):
                value, low, high = _pooled(chosen, key)
                axes.barh(place + offset, value, 0.36, color=colour, xerr=[[value - low], [high - value]], capsize=2)
                axes.text(max(value, high) + 1.5, place + offset, f"{value:.0f}", va="center", fontsize=8)
        axes.set_xlim(0, 109 if sets else 50)
        axes.set_xlabel("% of requests, 95 % interval")
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    left.set_yticks(range(len(variants)), [name for name, _ in variants])
    left.set_ylabel("model")
    figure.suptitle("grey: without the adapter, coloured: with it attached, no training", fontsize=9, x=0.01, ha="left")
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
