"""The gate: how harmful is what is being asked or written at this position?

    x_l = rms_norm(h_l), realigned                               one to three layers (see `realignment`)
    s   = v · silu(Σ_l W_l x_l + b) + c                          the score, a logit
    g   = clamp((s − τ) / w, 0, 1)                               exactly 0 below the threshold

Everything is a function of one position's own residual. There is no state: what the gate decided on the prompt reaches
later tokens through attention, and it is read again at every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def normalise(hidden: Tensor) -> Tensor:
    """Residual [..., d] of any float dtype → float32, root mean square 1 over the features."""
    return F.rms_norm(hidden.float(), (hidden.shape[-1],), eps=1e-6)


class Gate(nn.Module):
    """Small non-linear head on the normalised residual of `layers` layers (d → width → 1)."""

    def __init__(self, layers: int, hidden_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(layers, width, hidden_size) * (layers * hidden_size) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(width))
        self.out = nn.Parameter(torch.randn(width) * width**-0.5)
        self.out_bias = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Sequence[Tensor]) -> Tensor:
        """One residual [..., d] per gate layer → score [...], float32."""
        features = [normalise(h) for h in hidden]
        return self.score(features)

    def score(self, features: Sequence[Tensor]) -> Tensor:
        """Features [..., d] per gate layer, normalised and calibrated → score [...]."""
        return self.head(self.bias + sum(F.linear(x, w) for x, w in zip(features, self.weight, strict=True)))

    def head(self, inner: Tensor) -> Tensor:
        """Pre-activation [..., width] → score [...]."""
        return F.linear(F.silu(inner), self.out[None])[..., 0] + self.out_bias

    @torch.no_grad()
    def fold(self, weight: Tensor, bias: Tensor, threshold: float, ramp: float) -> FoldedGate:
        """Put calibration into the weights, so that it costs nothing at inference.

        Args:
            weight, bias: [layers, width, d] and [width]: W and b with the realignment of a checkpoint inside.
            threshold, ramp: τ and w, in units of the score.
        """
        return FoldedGate(
            weight=tuple(weight.float().unbind(0)),
            bias=bias.float(),
            out=(self.out / ramp)[None].float(),
            out_bias=((self.out_bias - threshold) / ramp)[None].float(),
        )


class FoldedGate(NamedTuple):
    """A gate with its calibration inside: 'opening' (s − τ) / w is one chain of matrix products."""

    weight: tuple[Tensor, ...]
    bias: Tensor
    out: Tensor
    out_bias: Tensor

    def partial(self, hidden: Tensor, index: int, below: Tensor | None) -> Tensor:
        """Add gate layer `index`'s share to the head's pre-activation [..., width]."""
        start = self.bias if below is None else below
        return F.linear(normalise(hidden), self.weight[index]) + start

    def opening(self, inner: Tensor) -> Tensor:
        """Pre-activation [..., width] → (s − τ) / w, [..., 1]."""
        return F.linear(F.silu(inner), self.out, self.out_bias)

    def to(self, device: torch.device) -> FoldedGate:
        return FoldedGate(
            tuple(w.to(device) for w in self.weight),
            self.bias.to(device),
            self.out.to(device),
            self.out_bias.to(device),
        )


def open_hard(opening: Tensor) -> Tensor:
    """g = clamp(opening, 0, 1). A NaN score opens the gate fully: protection never fails open."""
    return opening.nan_to_num(nan=1.0).clamp(0.0, 1.0)


def open_soft(opening: Tensor) -> Tensor:
    """Differentiable stand-in for `open_hard`, for attacks and training; equals ½ at the middle of the ramp."""
    return torch.sigmoid(4.0 * (opening.nan_to_num(nan=1.0) - 0.5))
