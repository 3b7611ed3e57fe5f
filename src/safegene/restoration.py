"""Restoration: lead the residual of a protected fine-tune back to the protected base's. Pure mathematics, no hooks, no I/O.

A fine-tune that was taught to comply is pulled away from a refusal by every layer above, however clearly the gate opens. What the
protected base's residual was while it refused the anchors, y_j, travels with the adapter. At a restored layer, on the fine-tune,

    h_j                     the residual there, an intervention added where there is one, as the same refusals are read
    x_j = rms_norm          of the residual before it
    d_j = y_j − h_j         what is missing; 0 on harmless anchors, which stay as they are

    U V, b = argmin Σ_j w_j |d_j − U V (x_j − x̄) − b|² + λ s |U V|²        s = mean squared singular value of the x_j − x̄

of rank k: ridge regression, then the best rank k of what it fits (reduced-rank regression: Izenman 1975; with a ridge: Mukherjee & Zhu
2011). At inference h ← h + g (U V x + b), beside the trained correction (see `adapter`): where the gate is shut nothing changes.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from safegene.errors import CalibrationError

RANK = 4
"""k. On a fine-tune taught to comply 16 refused no more at four layers, and 4 keep the adapter within a thousandth of the model."""

RIDGE = 0.1
"""λ. 0.03 and 0.3 did a little worse (docs/log.md)."""

HARMLESS_WEIGHTS = (4.0, 0.5)
"""w of a harmless position beside a refusal's, tried in this order. The heavier, the less a gate that misfires costs: task loss of a support
fine-tune +0.3 % at 8, +1.2 at 2, +4.1 at 0.5. One that was taught to comply needs the light one: JailbreakBench 43, 65 and 83 % (docs/log.md)."""


class Restoration(NamedTuple):
    """V [k, d], U [d, k] and b [d] of one layer, float32."""

    lead: Tensor
    back: Tensor
    offset: Tensor

    @classmethod
    def none(cls, size: int, rank: int = 0) -> Self:
        """The base's own: nothing is missing. `size`: d; `rank`: k."""
        return cls(torch.zeros(rank, size), torch.zeros(size, rank), torch.zeros(size))

    @classmethod
    def fit(cls, x: Tensor, missing: Tensor, harmful: Tensor, harmless_weight: float) -> Self:
        """Fit one layer. At most RANK of k, less where d or the positions are fewer.

        Args:
            x: normalised residuals [positions, d].
            missing: d_j, [positions, d]; 0 where `harmful` is false.
            harmful: [positions], bool.
            harmless_weight: w of the others, beside 1.

        Raises:
            CalibrationError: the residuals hold NaN or infinity.
        """
        w = torch.where(harmful, 1.0, harmless_weight)[:, None].to(x)
        centre, mean = (w * x).sum(0) / w.sum(), (w * missing).sum(0) / w.sum()
        z, d = w.sqrt() * (x - centre), w.sqrt() * (missing - mean)
        if not (torch.isfinite(z).all() and torch.isfinite(d).all()):
            raise CalibrationError("The model's hidden states hold NaN or infinity; check its weights.")
        left, sizes, right = torch.linalg.svd(z, full_matrices=False)
        ridged = (sizes / (sizes.square() + RIDGE * sizes.square().mean()).clamp_min(1e-12))[:, None] * (left.T @ d)
        # What is fitted, z Wᵀ = left · diag(sizes) · ridged: its right singular vectors are the directions that are written.
        back = torch.linalg.svd(sizes[:, None] * ridged, full_matrices=False).Vh[:RANK].T
        lead = (right.T @ ridged @ back).T
        return cls(lead, back, mean - back @ (lead @ centre))
