"""The core results as Markdown tables: figure, number of prompts, 95 % interval."""

from __future__ import annotations

from typing import Any


def _rate(r: dict[str, float]) -> str:
    return f"{100 * r['value']:.1f} % [{100 * r['low']:.1f}, {100 * r['high']:.1f}], n = {r['n']}"


def core_markdown(results: dict[str, Any]) -> str:
    """Every figure of `core` that the variants hold, as Markdown."""
    parameters = results["parameters"]
    lines = [
        f"Adapter {results['adapter'][:8]} on {results['model']}: {parameters['count']:,} parameters, "
        f"{100 * parameters['share']:.3f} % of the model; at most {results['n']} prompts a set.",
        "", "### Harmful requests: safety score", "",
        "| variant | set | without | with adapter | gate opened by the prompt |", "|---|---|---|---|---|",
    ]  # fmt: skip
    variants = results["variants"]
    for name, v in variants.items():
        for key, s in v["harmful"].items():
            lines.append(
                f"| {name} | {key} | {_rate(s['without'])} | {_rate(s['with'])} | {_rate(s['gate_open_at_prompt'])} |"
            )
    lines += ["", "### Harmless requests: refused", "",
              "| variant | set | without | with adapter | gate opened, answer included |", "|---|---|---|---|---|"]  # fmt: skip
    for name, v in variants.items():
        for key, s in v["harmless"].items():
            lines.append(f"| {name} | {key} | {_rate(s['without'])} | {_rate(s['with'])} | {_rate(s['gate_opened'])} |")
    lines += ["", "### By variant", "",
              "| variant | retention | calibration off, safety | gate shut through 256 tokens | task loss | tokens with g > 0 | attach |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, v in variants.items():
        off = ", ".join(f"{k} {100 * r['value']:.0f} %" for k, r in v.get("calibration_off", {}).items()) or "–"
        loss = v.get("task_loss")
        task = f"{loss['without']:.4f} → {loss['with']:.4f} ({100 * loss['relative']:+.2f} %)" if loss else "–"
        share = loss["tokens_open"] if loss else v["tokens_open"]
        kept = _rate(v["retention"]) if "retention" in v else "–"
        lines.append(
            f"| {name} | {kept} | {off} | {_rate(v['closed_256'])} | {task} | {100 * share:.2f} % | {v['attach_seconds']:.1f} s |"
        )
    base = variants.get("base", {})
    if "overhead" in base:
        r = base["refusals"]
        lines += ["", "### The base with the adapter", "",
                  f"- Compliant prefill, JailbreakBench: {_rate(base['prefilled'])} safe.",
                  f"- Refusals on JailbreakBench, 128 tokens: {r['refused']} of {r['of']}, {r['distinct']} distinct, "
                  f"{r['goes_on']} that go on to comply.",
                  f"- Self-harm requests (own held-out text): {_rate(base['self_harm']['safe'])} safe; "
                  f"{_rate(base['self_harm']['points_to_support'])} point to support."]  # fmt: skip
        lines += [
            f"- Overhead, {k}: {100 * o['value']:+.2f} % [{100 * o['low']:+.2f}, {100 * o['high']:+.2f}], {o['n']} pairs, "
            f"gate open at {100 * o['open']:.1f} % of the positions."
            for k, o in base["overhead"].items()
        ]
    return "\n".join(lines)
