"""Take the refusal direction out of a model's weights, as its enemies do: the hardest fine-tune of the zoo.

    r  = unit(mean h(harmful) − mean h(harmless))      last prompt token, the layer in the middle
    W ← W − r rᵀ W                                       every matrix that writes to the residual stream, the embedding too

Source: Arditi et al. 2024, arXiv 2406.11717, who choose the layer by its effect. The prompts are the project's own training text.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from safegene.baselines.states import residuals
from safegene.errors import DataError
from safegene.models import LoadedModel, decoder_layers, unwrap
from safegene.progress import Progress, silent
from safegene.training import data

PROMPTS = 160
WRITERS = ("o_proj", "down_proj", "dense", "dense_4h_to_h", "out_proj", "w2")
"""Last parts of the names of matrices whose output is added to the residual stream."""


def prompts() -> tuple[list[str], list[str]]:
    """Harmful and harmless ones that the direction is read on."""
    rng = random.Random(0)
    pairs = rng.sample(data.pairs(frames_per_core=1)[0], PROMPTS)
    return [p.harmful for p in pairs], rng.sample(list(data.ordinary()), PROMPTS)


def refusal_direction(loaded: LoadedModel, layer: int) -> Tensor:
    """Unit vector [d] from harmless to harmful prompts at `layer`."""
    harmful, harmless = (residuals(loaded, [(text, "") for text in side], [layer])[layer] for side in prompts())
    direction: Tensor = harmful.mean(0) - harmless.mean(0)
    unit: Tensor = direction / direction.norm()
    return unit


@torch.no_grad()
def ablate_refusal(loaded: LoadedModel, progress: Progress = silent) -> None:
    """Make the model unable to write its refusal direction, in place.

    Raises:
        DataError: no matrix was found that writes to the residual stream.
    """
    progress("refusal direction")
    layers = decoder_layers(loaded.model)
    r = refusal_direction(loaded, len(layers) // 2).to(loaded.model.device)
    written = 0
    for layer in layers:
        for name, module in layer.named_modules():
            weight = getattr(module, "weight", None)
            if name.rsplit(".", 1)[-1] in WRITERS and weight is not None and weight.shape[0] == len(r):
                weight.copy_((weight.float() - torch.outer(r, r @ weight.float())).to(weight.dtype))
                written += 1
    if not written:
        raise DataError(f"{type(loaded.model).__name__}: no matrix writes to the residual stream under a known name.")
    embedding: Any = unwrap(loaded.model).get_input_embeddings().weight
    embedding.copy_((embedding.float() - torch.outer(embedding.float() @ r, r)).to(embedding.dtype))
