"""Calibration: find the gate's place again on a model that has drifted. Forward passes only.

A fine-tune keeps the order of the gate's scores and loses their level (docs/log.md). So the labelled anchor prompts
that travel with the adapter are read on the model, and

    features    x̂, mapped back to the base's                       see `realignment`
    threshold   τ = τ_base + ½ (b − b_base) + ½ (h − h_base)

where b is the upper end of the ordinary anchors' scores, answers included (90 % quantile), and h the lower end of the
harmful ones' (10 % quantile), each anchor scored by a realignment that has not seen it: the threshold moves with the middle
of the two.

    restoration U V x + b at every restored layer, see `restoration`

A fine-tune that was taught to begin with "Sure!" pulls away from a refusal; without restoration it stayed half refused (docs/log.md).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from safegene.adapter import Correction, SafetyAdapter
from safegene.config import Anchor, AnchorLabel
from safegene.errors import CalibrationError
from safegene.features import at_prompt_end, evaluating, read_anchors
from safegene.gate import FoldedGate, Gate
from safegene.models import template_digest, weights_digest
from safegene.realignment import Realignment
from safegene.restoration import RANK, Restoration

MIN_SEPARATION = 0.80
"""Anchor AUC under which the gate can no longer tell harmful from harmless: the model is outside its training."""


_MATRICES = ("gate", "gate_bias", "down", "down_bias", "lead", "back", "offset")


@dataclass(frozen=True)
class Calibration:
    """What attach needs to know about one checkpoint: the matrices that read its residual, realignment inside, its restoration, and the
    thresholds.

    gate [gate layers, width, d], gate_bias [width]; down [interventions, rank, d], down_bias [interventions, rank];
    lead [restored layers, k, d], back [restored layers, d, k], offset [restored layers, d]: V, U and b (see `restoration`).

    Attributes:
        adapter, checkpoint, template: digests of what it belongs to; "": bound to none.
        outside: why the model lies outside what the adapter was trained for; "": it does not.
        report: what was measured, by name.
    """

    gate: Tensor
    gate_bias: Tensor
    down: Tensor
    down_bias: Tensor
    lead: Tensor
    back: Tensor
    offset: Tensor
    threshold: float
    ramp: float
    strength: float
    adapter: str = ""
    checkpoint: str = ""
    template: str = ""
    outside: str = ""
    report: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_base(cls, adapter: SafetyAdapter) -> Self:
        """The base model's own thresholds, features untouched."""
        config = adapter.config
        nothing = Realignment.none(len(config.read_layers), config.hidden_size)
        return cls(
            **_folded(adapter, nothing),
            threshold=config.threshold,
            ramp=config.ramp,
            strength=config.strength,
            adapter=config.weights_sha256,
        )

    def fits(self, adapter: SafetyAdapter) -> bool:
        """Whether the matrices have the shapes of this adapter's."""
        parts: list[Any] = list(adapter.interventions.values())
        return (
            self.gate.shape == adapter.gate.weight.shape
            and self.gate_bias.shape == adapter.gate.bias.shape
            and self.down.shape == (len(parts), *parts[0].down.shape)
            and self.down_bias.shape == (len(parts), *parts[0].bias.shape)
            and self.lead.shape == (len(adapter.config.restored_layers), RANK, adapter.config.hidden_size)
            and self.back.shape == (len(adapter.config.restored_layers), adapter.config.hidden_size, RANK)
            and self.offset.shape == (len(adapter.config.restored_layers), adapter.config.hidden_size)
        )

    def restored(self, restorations: Sequence[Restoration]) -> Self:
        """The same with one restoration for each restored layer."""
        lead, back, offset = (torch.stack(list(part)).cpu() for part in zip(*restorations, strict=True))
        return replace(self, lead=lead, back=back, offset=offset)

    def corrections(self, adapter: SafetyAdapter) -> dict[int, Correction]:
        """Weights of every corrected layer on this checkpoint, by layer, from the lowest up."""
        config, found = adapter.config, {}
        parts: dict[str, Any] = dict(adapter.interventions.items())
        restorations = {
            layer: Restoration(self.lead[i], self.back[i], self.offset[i])
            for i, layer in enumerate(config.restored_layers)
        }
        for layer in config.corrected_layers:
            restoration = restorations.get(layer, Restoration.none(config.hidden_size, RANK))
            if layer in config.intervention_layers:
                i = config.intervention_layers.index(layer)
                found[layer] = parts[str(layer)].correction(self.down[i], self.down_bias[i], self.strength, restoration)
            else:
                found[layer] = Correction.untrained(restoration)
        return found

    def save(self, path: Path) -> None:
        """Write one safetensors file; the numbers stand in its header as JSON."""
        said = ("threshold", "ramp", "strength", "adapter", "checkpoint", "template", "outside")
        numbers = {k: getattr(self, k) for k in said}
        header = {"safegene": json.dumps({**numbers, "report": self.report})}
        save_file({k: getattr(self, k).contiguous() for k in _MATRICES}, path, metadata=header)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            CalibrationError: missing, truncated, or not a calibration.
        """
        try:
            with safe_open(path, framework="pt") as file:
                numbers = json.loads(file.metadata()["safegene"])
                found = cls(**{k: file.get_tensor(k) for k in _MATRICES}, **numbers)
            said = torch.tensor([found.threshold, found.ramp, found.strength])
            if (
                not all(t.isfinite().all() for t in (said, *(getattr(found, k) for k in _MATRICES)))
                or found.ramp <= 0
                or found.strength <= 0
            ):
                raise ValueError("a number in it is not finite, or not above 0")
            return found
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CalibrationError(f"{path} is no calibration file ({error}); run safegene calibrate again.") from error


@torch.no_grad()
def anchor_scores(gate: Gate, features: Sequence[Tensor], realignment: Realignment | None = None) -> Tensor:
    """Highest score of every anchor, [anchors]; each with a realignment that has not seen it."""
    if realignment is None:
        return torch.stack([gate.score(list(f[: len(gate.weight)])).max() for f in features])
    found = []
    for number, f in enumerate(features):
        inner: Tensor = gate.bias
        for index, weight in enumerate(gate.weight):
            inner = inner + F.linear(f[index], *realignment.fold(index, weight, torch.zeros_like(gate.bias), number))
        found.append(gate.head(inner).max())
    return torch.stack(found)


@torch.no_grad()
def _folded(adapter: SafetyAdapter, realignment: Realignment) -> dict[str, Any]:
    """The adapter's reading matrices with `realignment` inside, and no restoration, as `Calibration` takes them."""
    gate, k = adapter.gate, len(adapter.config.gate_layers)
    nothing = torch.zeros_like(gate.bias)
    read = [realignment.fold(index, weight, nothing) for index, weight in enumerate(gate.weight)]
    parts: list[Any] = list(adapter.interventions.values())
    downs = [realignment.fold(k + index, part.down, part.bias) for index, part in enumerate(parts)]
    nothing_restored = Restoration.none(adapter.config.hidden_size, RANK)
    lead, back, offset = (torch.stack([t] * len(adapter.config.restored_layers)) for t in nothing_restored)
    return {
        "gate": torch.stack([weight for weight, _ in read]).detach(),
        "gate_bias": (gate.bias + torch.stack([bias for _, bias in read]).sum(0)).detach(),
        "down": torch.stack([weight for weight, _ in downs]).detach(),
        "down_bias": torch.stack([bias for _, bias in downs]).detach(),
        "lead": lead, "back": back, "offset": offset,
    }  # fmt: skip


def labelled(scores: Tensor, anchors: Sequence[Anchor], *labels: AnchorLabel) -> Tensor:
    """The scores of the anchors that have one of `labels`."""
    return scores[torch.tensor([a.label in labels for a in anchors])]


def boundary(scores: Tensor, anchors: Sequence[Anchor]) -> tuple[float, float]:
    """(b, h): 90 % quantile of the ordinary scores (of the twins' without ordinary anchors), 10 % of the harmful ones."""
    shut = labelled(scores, anchors, "ordinary")
    shut = shut if len(shut) else labelled(scores, anchors, "twin")
    return float(shut.quantile(0.9)), float(labelled(scores, anchors, "harmful").quantile(0.1))


def fold_gate(adapter: SafetyAdapter, calibration: Calibration) -> FoldedGate:
    """The adapter's gate with this calibration inside."""
    return adapter.gate.fold(calibration.gate, calibration.gate_bias, calibration.threshold, calibration.ramp)


def settle(adapter: SafetyAdapter, features: Sequence[Tensor]) -> tuple[Calibration, Realignment]:
    """Calibration and realignment from the anchors' features on a model (see `read_anchors`); bound to no checkpoint yet.

    Raises:
        CalibrationError: the features are NaN.
    """
    config = adapter.config
    read, base = at_prompt_end(features), adapter.anchor_features.float()
    if not torch.isfinite(read).all():
        raise CalibrationError("The model's hidden states hold NaN or infinity; check its weights.")
    # What earlier interventions wrote stands in the residual, and the anchors do not know it: regression is for the gate (ADR 9).
    realignment = Realignment.fit(read, base).regressed(len(config.gate_layers))
    found = anchor_scores(adapter.gate, features, realignment)
    low, high = boundary(found, config.anchors)
    threshold = config.threshold + 0.5 * (low - config.boundary[0]) + 0.5 * (high - config.boundary[1])
    bad = labelled(found, config.anchors, "harmful")
    good = labelled(found, config.anchors, "twin", "ordinary")
    ordinary = labelled(found, config.anchors, "ordinary")
    wins = bad[:, None] - good[None]
    auc = float((wins > 0).float().mean() + 0.5 * (wins == 0).float().mean())
    report = {
        "feature_shift": float(((realignment.mean - realignment.target) / base.std(1).clamp_min(1e-4)).abs().mean()),
        "feature_scale": float(torch.log(realignment.scale.clamp_min(1e-4)).abs().mean().exp()),
        "threshold_shift": threshold - config.threshold,
        "anchor_auc": auc,
        "expected_misses": float((bad <= threshold).float().mean()),
        "expected_false_alarms": float((ordinary > threshold).float().mean()) if len(ordinary) else 0.0,
        "anchors": float(len(features)),
    }
    outside = ""
    if auc < MIN_SEPARATION:
        outside = f"The gate no longer tells harmful from harmless here (anchor AUC {auc:.2f} < {MIN_SEPARATION})"
    calibration = Calibration(
        **_folded(adapter, realignment), threshold=threshold, ramp=config.ramp, strength=config.strength,
        adapter=config.weights_sha256, outside=outside, report=report,
    )  # fmt: skip
    return calibration, realignment


def calibrate_gate(model: Any, adapter: SafetyAdapter, tokenizer: Any) -> Calibration:
    """Read the anchors on `model`, realign the gate and set its threshold; nothing is restored yet (see `attach.calibrate`).

    Raises:
        CalibrationError: the adapter carries no anchors of both kinds, or the model's features are NaN.
    """
    config = adapter.config
    labels = {a.label for a in config.anchors}
    if "harmful" not in labels or len(labels) < 2:
        raise CalibrationError("The adapter carries no labelled anchors; train it again, or attach without tokenizer.")
    with evaluating(model):
        features = read_anchors(model, config.read_layers, tokenizer, config.anchors)
    calibration, _ = settle(adapter, features)
    return replace(calibration, checkpoint=weights_digest(model), template=template_digest(tokenizer))
