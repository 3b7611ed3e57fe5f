"""SafeLoRA: where a fine-tune's update points away from the safety subspace, project it there.

C = V Vᵀ / ‖V‖        V = W_aligned − W_degraded, per matrix
ΔW ← C ΔW             where cos(C ΔW, ΔW) < τ
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from safegene.baselines.method import Cost, Method, Protected, Setting, difference, generated, matrices
from safegene.models import LoadedModel

TAU = 0.35


class SafeLora(Method):
    """On merged weights, so that it works for full fine-tunes too."""

    name: ClassVar[str] = "safe-lora"
    source: ClassVar[str] = "Hsu et al. 2024, arXiv 2405.16833"

    def prepare(self, setting: Setting) -> None:
        self.safety = difference(setting.aligned(), setting.degraded())
        self.base = matrices(setting.load().model)

    def mended(self, name: str, update: Tensor, projected: Tensor) -> Tensor:
        """What replaces an update that points away; all [out, in], float32."""
        return projected

    def protect(self, loaded: LoadedModel, setting: Setting) -> Protected:
        for name, weight in matrices(loaded.model).items():
            start = self.base[name].float()
            update = weight.float() - start
            projected, similarity = project(self.safety[name], update)
            if similarity < TAU:
                weight.copy_((start + self.mended(name, update, projected)).to(weight.dtype))
        return Protected(loaded.model, loaded.tokenizer, generated(loaded), Cost())


def project(safety: Tensor, update: Tensor) -> tuple[Tensor, float]:
    """C ΔW, and its cosine with ΔW; both [out, in]. An update of zero is left alone (similarity 1)."""
    if not float(update.norm()):
        return update, 1.0
    projected = safety @ (safety.T @ update) / safety.norm().clamp_min(1e-12)
    return projected, float(F.cosine_similarity(projected.flatten(), update.flatten(), dim=0))
