"""The adapter: a gated low-rank correction of the residual stream. Pure mathematics, no hooks, no I/O.

    c = silu(A rms_norm(h) + a)                                    r features of the residual: what is asked, and how
    q = sigmoid(w · c + u)                                         how harmful the wish looks from this layer
    h ← where(g > 0, h + g · (q · α · scale · B c + U V x + b), h)  at every corrected layer, x = rms_norm(h)

A: d→r, B: r→d, none of them at a layer that is restored only. U V x + b is nothing on the base, and on a fine-tune what `restoration`
fitted. `scale` is the base's typical residual size at that layer, so that B starts near 1 in every model.
The gate's g keeps ordinary text untouched; q lets every layer tell a harmful request from its harmless twin (ADR 3).
Computed in float32 and cast back; with g = 0 the residual is returned bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safegene.config import AdapterConfig
from safegene.gate import Gate, normalise
from safegene.restoration import RANK, Restoration


class Correction(NamedTuple):
    """Weights of one intervention: A [r, d], a [r], B [d, r], w [r], u [1], float32; strength = α · scale; V [k, d], U [d, k], b [d]."""

    down: Tensor
    bias: Tensor
    up: Tensor
    wish: Tensor
    wish_bias: Tensor
    strength: Tensor | float
    lead: Tensor
    back: Tensor
    offset: Tensor

    def to(self, device: torch.device) -> Correction:
        """Detached copies in float32 on `device`."""
        down, bias, up, wish, wish_bias = (t.detach().float().to(device) for t in self[:5])
        lead, back, offset = (t.detach().float().to(device) for t in (self.lead, self.back, self.offset))
        return Correction(down, bias, up, wish, wish_bias, float(self.strength), lead, back, offset)

    @classmethod
    def untrained(cls, restoration: Restoration) -> Correction:
        """Of a layer without an intervention: r = 0."""
        down, back = restoration.lead[:0], restoration.back[:, :0]
        return cls(down, down.new_zeros(0), back, down.new_zeros(0), down.new_zeros(1), 1.0, *restoration)

    def restored(self, restoration: Restoration) -> Correction:
        """The same with another U V x + b."""
        return self._replace(**{k: t.to(self.down.device) for k, t in restoration._asdict().items()})


def intervene(hidden: Tensor, g: Tensor, weights: Correction) -> Tensor:
    """Apply one gated intervention.

    Args:
        hidden: residual [..., d], any float dtype; not changed in place.
        g: gate value [..., 1], float32 in [0, 1].

    Returns:
        residual [..., d] in the dtype of `hidden`; where g is 0, exactly `hidden`.
    """
    down, bias, up, wish, wish_bias, strength, lead, back, offset = weights
    x = normalise(hidden)
    code = F.silu(F.linear(x, down, bias))
    harmful = torch.sigmoid(F.linear(code, wish[None], wish_bias))
    written = F.linear(code * (harmful * strength), up) + F.linear(F.linear(x, lead), back, offset)
    # torch.where, not multiplication by g: 0 · NaN must not leak, and a closed gate must leave every bit alone.
    return torch.where(g > 0, (hidden + g * written).to(hidden.dtype), hidden)


class Intervention(nn.Module):
    """Weights of the correction at one layer. Starts at zero effect (B = 0)."""

    scale: Tensor

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, hidden_size) * hidden_size**-0.5)
        self.bias = nn.Parameter(torch.zeros(rank))
        self.up = nn.Parameter(torch.zeros(hidden_size, rank))
        self.wish = nn.Parameter(torch.zeros(rank))
        self.wish_bias = nn.Parameter(torch.zeros(1))
        self.register_buffer("scale", torch.ones(()))

    def correction(
        self, down: Tensor, bias: Tensor, strength: Tensor | float = 1.0, restoration: Restoration | None = None
    ) -> Correction:
        """The weights as `intervene` takes them, at strength α. `down` [r, d] and `bias` [r] are A and a with the realignment of a
        checkpoint inside; `restoration` is that of the checkpoint, on the base none."""
        r = restoration or Restoration.none(len(self.up))
        return Correction(
            down, bias, self.up, self.wish, self.wish_bias, self.scale * strength, *(t.to(down.device) for t in r)
        )


class SafetyAdapter(nn.Module):
    """Gate and interventions of one base model, and what calibration needs to know about that base.

    Buffers:
        anchor_features: [gate layers + intervention layers, anchors, d], float16: the anchors' features at
            `config.read_layers` on the base model, at the last prompt token.
        residuals: [restored layers, positions, d], bfloat16: the protected base's residual there while it refuses the harmful anchors
            (see `refusals`).
        sketch: [matrices, projections], random projections of the base's weights (see `models.weight_sketch`).
    """

    anchor_features: Tensor
    residuals: Tensor
    sketch: Tensor

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Gate(len(config.gate_layers), config.hidden_size, config.gate_width)
        self.interventions = nn.ModuleDict(
            {str(layer): Intervention(config.hidden_size, config.rank) for layer in config.intervention_layers}
        )
        shape = (len(config.read_layers), len(config.anchors), config.hidden_size)
        self.register_buffer("anchor_features", torch.zeros(shape, dtype=torch.float16))
        self.register_buffer("residuals", torch.zeros(len(config.restored_layers), 0, config.hidden_size).bfloat16())
        self.register_buffer("sketch", torch.zeros(0, 0))

    def parameter_count(self) -> int:
        """Numbers that take part in inference on a fine-tune: gate, interventions and restoration, without what calibration needs of
        the base."""
        restored = len(self.config.restored_layers) * self.config.hidden_size * (2 * RANK + 1)
        return sum(p.numel() for p in self.parameters()) + restored

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None) -> Self:
        """Load from a folder, a shipped adapter's name or a hub id (see `safegene.hub.load_adapter`).

        Raises:
            AdapterFileError: missing, damaged, or of another version of the format.
        """
        from safegene import hub

        return hub.load_adapter(name, cls, revision=revision)

    def save_pretrained(self, folder: str | Path, *, card: str | None = None) -> None:
        """Write `safegene_config.json`, `safegene_model.safetensors` and `README.md` (see `safegene.hub.save_adapter`); the weights'
        digest goes into the configuration.

        Raises:
            AdapterFileError: the weights hold NaN, or the folder cannot be written.
        """
        from safegene import hub

        hub.save_adapter(self, Path(folder), card=card)
