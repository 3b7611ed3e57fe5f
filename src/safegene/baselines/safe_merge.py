"""SafeMERGE: where a fine-tune's update points away from the safety subspace, merge it with a safe model's.

ΔW ← α ΔW + (1 − α) ΔW_safe      where cos(C ΔW, ΔW) is lowest, C and their share as in SafeLoRA
"""

from __future__ import annotations

from torch import Tensor

from safegene.baselines.method import Setting, difference
from safegene.baselines.safe_lora import SafeLora

ALPHA = 0.8


class SafeMerge(SafeLora):
    """The safe model is the base tuned on the budget's refusals, once."""

    name = "safe-merge"
    source = "Djuhera et al. 2025, arXiv 2503.17239"

    def prepare(self, setting: Setting) -> None:
        super().prepare(setting)
        self.safe = difference(setting.aligned(), setting.base)

    def mended(self, name: str, update: Tensor, projected: Tensor) -> Tensor:
        return ALPHA * update + (1 - ALPHA) * self.safe[name].to(update.device)
