"""Safety vectors: add back, in weight space, what an aligned model has and a degraded one has lost.

RESTA   W ← W + γ DARE(V)                  V = W_aligned − W_degraded; DARE drops a share of V and scales the rest up
LSSF    W ← W + γ U_k S_k Vᵀ_k             k by the entropy of V's singular values
"""

from __future__ import annotations

import zlib
from typing import ClassVar

import torch
from torch import Tensor

from safegene.baselines.method import SAFETY_DATA, Cost, Method, Protected, Setting, generated, matrices
from safegene.models import LoadedModel, default_device

GAMMA = 1.0
DROPPED = 0.3


class SafetyVector(Method):
    """RESTA."""

    name: ClassVar[str] = "safety-vector"
    source: ClassVar[str] = "RESTA, Bhardwaj et al. 2024, arXiv 2402.11746"
    rests_on = SAFETY_DATA

    def vector(self, name: str, difference: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        kept = torch.rand(difference.shape, generator=generator) >= DROPPED
        return difference * kept.to(difference.device) / (1 - DROPPED)

    def prepare(self, setting: Setting) -> None:
        self.added = {name: GAMMA * self.vector(name, lost) for name, lost in setting.lost.items()}
        self.report = setting.surrogate

    def protect(self, loaded: LoadedModel, setting: Setting) -> Protected:
        for name, weight in matrices(loaded.model).items():
            weight.copy_((weight.float() + self.added[name].to(weight.device)).to(weight.dtype))
        return Protected(loaded.model, loaded.tokenizer, generated(loaded), Cost(), report=self.report)


class LowRankVector(SafetyVector):
    """LSSF: the part of the vector that its own entropy says is signal."""

    name = "low-rank-vector"
    source = "LSSF, arXiv 2602.00038"

    def vector(self, name: str, difference: Tensor) -> Tensor:
        u, s, vt = torch.linalg.svd(difference.to(default_device()), full_matrices=False)
        k = rank(s)
        part: Tensor = (u[:, :k] * s[:k]) @ vt[:k]
        return part.to(difference.device)


def rank(singular_values: Tensor) -> int:
    """Effective rank: exp of the entropy of the normalised singular values (Roy and Vetterli 2007), at least 1."""
    share = singular_values / singular_values.sum().clamp_min(1e-12)
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    return max(1, min(len(singular_values), round(float(entropy.exp()))))
