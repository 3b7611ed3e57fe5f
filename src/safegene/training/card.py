"""The model card that `safegene train` writes beside an adapter."""

from __future__ import annotations

from safegene.adapter import SafetyAdapter
from safegene.models import EMBEDDED

_CARD = """---
base_model: {hub_id}
library_name: safegene
license: apache-2.0
---
# Safety adapter for {base}

Attach it to {base} or to a fine-tune of it; no training there:

```python
handle = safegene.attach(model, safegene.SafetyAdapter.from_pretrained("..."), tokenizer=tokenizer)
```

- {parameters:,} parameters: a gate that reads layers {gate} and rank-{rank} interventions at layers {interventions}; on a fine-tune
  layers {restored} are led back to the base's.
- Trained on {whose} ({pairs:,} framed pairs of a harmful request and its harmless twin, {conversations} pairs of
  conversations, {ordinary:,} ordinary requests, {refusals} refusals) and on the base's own answers to harmless requests. No evaluation prompt.
- {shadows}
- On text that was kept out of training its gate opens on {harmful} of harmful requests, which is where its threshold was set, on
  {twin} of their twins and on {ordinary_opened} of ordinary chats, answers included (development data).
- What it does not do: it does not stop someone who takes it off; it was not attacked yet; it judges text, not who asks.
"""


def model_card(
    adapter: SafetyAdapter, report: dict[str, dict[str, float]], counts: dict[str, int], shadows: int
) -> str:
    """Card of a trained adapter; `report` is `gate.json`."""
    config = adapter.config
    embedded = config.base_model == EMBEDDED
    hub_id = f"HuggingFaceTB/{EMBEDDED}" if embedded else config.base_model

    def share(label: str) -> str:
        found = report[f"opened_{label}"]
        return f"{100 * found['share']:.1f} % (n = {found['n']})"

    own, counts = counts["own"], {k: n for k, n in counts.items() if k != "own"}
    added = (
        f"safegene's text and {own:,} rows that were added to it" if own else "safegene's own text alone, no public set"
    )
    return _CARD.format(
        base=config.base_model, hub_id=hub_id, parameters=adapter.parameter_count(), gate=", ".join(map(str, config.gate_layers)),
        restored=", ".join(map(str, config.restored_layers)), rank=config.rank, interventions=", ".join(map(str, config.intervention_layers)), whose=added, **counts,
        shadows=f"Drift in training: {shadows} shadow fine-tunes." if shadows else "No drift augmentation.",
        harmful=share("harmful"), twin=share("twin"), ordinary_opened=share("ordinary"),
    )  # fmt: skip
