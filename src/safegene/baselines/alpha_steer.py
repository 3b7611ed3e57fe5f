"""AlphaSteer: steer in closed form, by a matrix that is zero on harmless prompts and a refusal vector on harmful ones.

P        projection on the null space of the harmless activations (their smallest principal directions)
Δ        = P W,  W = argmin ‖H_harmful P W − R‖² + λ‖P W‖²             ridge regression; R repeats the refusal vector of `cast`
h        ← h + α h Δ                                                  at every position of the steered layers
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from safegene.baselines.cast import behaviour
from safegene.baselines.method import SAFETY_DATA, Cost, Method, Protected, Setting, generated
from safegene.baselines.states import residuals
from safegene.models import LoadedModel, decoder_layers

NULL = 0.4
"""Share of the directions, those in which harmless prompts vary least, in which steering may read."""

RIDGE = 10.0
PROMPTS = 240

ALPHA = 0.4
"""Of the residual's size, as long as R is, at each of the steered layers: declared, and the same for every base."""


class AlphaSteer(Method):
    """Matrices are solved on the base, once, and used on the fine-tune as they are."""

    name = "alpha-steer"
    source = "Sheng et al. 2025, arXiv 2506.07022"
    rests_on = (*SAFETY_DATA, "baselines/cast.py", "baselines/states.py", "calibration.py")

    def prepare(self, setting: Setting) -> None:
        base = setting.load()
        depth = len(decoder_layers(base.model))
        layers = [round(share * depth) for share in (0.4, 0.5, 0.6)]
        bad = residuals(base, [(p.harmful, "") for p in setting.pairs[:PROMPTS]], layers)
        # Harmless states at every position, answers included: steering acts there too, and far more of them than features
        # are needed, or the null space is what was merely not seen.
        good = residuals(base, [(r["prompt"], r["answer"]) for r in setting.harmless], layers, "every")
        vectors = behaviour(base, setting, layers)
        self.matrices = {layer: solve(bad[layer], good[layer], vectors[layer]) for layer in layers}

    def protect(self, loaded: LoadedModel, setting: Setting) -> Protected:
        stack: Any = decoder_layers(loaded.model)
        for layer, matrix in self.matrices.items():
            stack[layer].register_forward_hook(_steer(matrix.to(loaded.model.device)))
        size = sum(matrix.numel() for matrix in self.matrices.values())
        return Protected(loaded.model, loaded.tokenizer, generated(loaded), Cost(extra_parameters=size))


def _steer(matrix: Tensor) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        changed = hidden + ALPHA * (hidden.float() @ matrix).to(hidden.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def solve(harmful: Tensor, harmless: Tensor, vector: Tensor) -> Tensor:
    """Δ [d, d] from activations [n, d] of both sides and the refusal vector [d]."""
    _, basis = torch.linalg.eigh(harmless.T @ harmless / len(harmless))  # ascending
    null = basis[:, : round(NULL * len(basis))]
    seen = harmful @ null  # [n, k]
    target = vector.expand(len(harmful), -1)
    ridge = RIDGE * torch.eye(null.shape[1]) * float(seen.pow(2).mean())
    solved: Tensor = torch.linalg.solve(seen.T @ seen + ridge, seen.T @ target)
    matrix: Tensor = null @ solved
    return matrix
