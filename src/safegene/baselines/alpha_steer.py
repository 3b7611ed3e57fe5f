"""AlphaSteer: steer in closed form, by a matrix that is zero on harmless prompts and a refusal vector on harmful ones.

P        projection on the null space of the harmless activations (their smallest principal directions)
Δ        = P W,  W = argmin ‖H_harmful P W − R‖² + λ‖P W‖²             ridge regression; R repeats the refusal vector
h        ← h + α h Δ                                                  at every position of the steered layers
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from safegene.baselines.cast import behaviour
from safegene.baselines.method import Cost, Method, Protected, Setting, generated, last_states
from safegene.models import LoadedModel, decoder_layers
from safegene.training import data

NULL = 0.4
"""Share of the directions, those in which harmless prompts vary least, in which steering may read."""

RIDGE = 10.0
ALPHA = 1.0
PROMPTS = 240


class AlphaSteer(Method):
    """Matrices are solved on the base, once, and used on the fine-tune as they are."""

    name = "alpha-steer"
    source = "Sheng et al. 2025, arXiv 2506.07022"

    def protect(self, loaded: LoadedModel, setting: Setting) -> Protected:
        depth = len(decoder_layers(loaded.model))
        layers = [round(share * depth) for share in (0.4, 0.5, 0.6)]
        base = setting.load()
        harmless = [p.twin for p in setting.pairs[: PROMPTS // 2]] + random.Random(8).sample(
            list(data.ordinary()), PROMPTS
        )
        bad = last_states(base, [(p.harmful, "") for p in setting.pairs[:PROMPTS]], layers)
        good = last_states(base, [(text, "") for text in harmless], layers)
        vectors = behaviour(base, setting, layers)
        stack: Any = decoder_layers(loaded.model)
        size = 0
        for layer in layers:
            matrix = solve(bad[layer], good[layer], vectors[layer])
            size += matrix.numel()
            stack[layer].register_forward_hook(_steer(matrix))
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
    return null @ torch.linalg.solve(seen.T @ seen + ridge, seen.T @ target)
