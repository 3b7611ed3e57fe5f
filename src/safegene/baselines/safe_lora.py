"""SafeLoRA: where a fine-tune's update points away from the safety subspace, project it there.

C = V Vᵀ / ‖V‖        V = W_aligned − W_degraded, per matrix
ΔW ← C ΔW             for the matrices in which cos(C ΔW, ΔW) is lowest
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from safegene.baselines.method import SAFETY_DATA, Cost, Method, Protected, Setting, generated, matrices
from safegene.models import LoadedModel

SHARE = 0.11
"""Of the matrices that moved; about the share of layers that the paper projects. Its threshold does not carry over: V is of low rank
here, every update lies mostly outside of it, and all would be projected."""


class SafeLora(Method):
    """On merged weights, so that it works for full fine-tunes too."""

    name: ClassVar[str] = "safe-lora"
    source: ClassVar[str] = "Hsu et al. 2024, arXiv 2405.16833"
    rests_on = SAFETY_DATA

    def prepare(self, setting: Setting) -> None:
        self.safety, self.report = setting.lost, setting.surrogate
        self.base = matrices(setting.load().model)

    def mended(self, name: str, update: Tensor, projected: Tensor) -> Tensor:
        """What replaces an update that points away; all [out, in], float32."""
        return projected

    def protect(self, loaded: LoadedModel, setting: Setting) -> Protected:
        weights = matrices(loaded.model)
        similar = {}
        for name, weight in weights.items():
            update = weight.float() - self.base[name].float()
            if float(update.norm()):
                similar[name] = project(self.safety[name].to(update.device), update)[1]
        away = sorted(similar, key=lambda name: similar[name])[: round(SHARE * len(similar))]
        for name in away:
            start = self.base[name].float()
            update = weights[name].float() - start
            projected, _ = project(self.safety[name].to(update.device), update)
            weights[name].copy_((start + self.mended(name, update, projected)).to(weights[name].dtype))
        report = {**self.report, "matrices_moved": float(len(similar)), "matrices_mended": float(len(away))}
        return Protected(loaded.model, loaded.tokenizer, generated(loaded), Cost(), report=report)


def project(safety: Tensor, update: Tensor) -> tuple[Tensor, float]:
    """C ΔW, and its cosine with ΔW; both [out, in]."""
    projected = safety @ (safety.T @ update) / safety.norm().clamp_min(1e-12)
    return projected, float(F.cosine_similarity(projected.flatten(), update.flatten(), dim=0))
