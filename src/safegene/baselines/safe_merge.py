"""SafeMERGE: where a fine-tune's update points away from the safety subspace, merge it with a safe model's.

ΔW ← α ΔW + (1 − α) ΔW_safe      where cos(C ΔW, ΔW) < τ, C as in SafeLoRA
"""

from __future__ import annotations

from safegene import models
from safegene.baselines.method import Cost, Method, Protected, Setting, difference, generated, matrices
from safegene.baselines.safe_lora import TAU, project
from safegene.models import LoadedModel

ALPHA = 0.8


class SafeMerge(Method):
    """The safe model is the base tuned on the budget's refusals, once."""

    name = "safe-merge"
    source = "Djuhera et al. 2025, arXiv 2503.17239"

    def prepare(self, setting: Setting) -> None:
        setting.degraded()

    def protect(self, loaded: LoadedModel, setting: Setting) -> Protected:
        safety = difference(setting.aligned(), setting.degraded())
        base = matrices(setting.load().model)
        safe = matrices(models.load(setting.aligned(), dtype="bfloat16").model)
        for name, weight in matrices(loaded.model).items():
            start = base[name].float()
            update = weight.float() - start
            if project(safety[name], update)[1] < TAU:
                merged = ALPHA * update + (1 - ALPHA) * (safe[name].float() - start)
                weight.copy_((start + merged).to(weight.dtype))
        return Protected(loaded.model, loaded.tokenizer, generated(loaded), Cost())
