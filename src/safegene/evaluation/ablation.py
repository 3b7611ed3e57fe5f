"""Take the refusal direction out of a model's weights, as its enemies do: the hardest fine-tune of the zoo.

    r  = unit(mean h(harmful) − mean h(harmless))      last prompt token, one layer in the middle
    W ← W − r rᵀ W                                       every matrix that writes to the residual stream, and the embedding

Source: Arditi et al. 2024, arXiv 2406.11717. The prompts are the project's own training text.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from safegene.calibration import end_of_turn, gate_features
from safegene.errors import DataError
from safegene.models import decoder_layers, unwrap
from safegene.progress import Progress, silent
from safegene.training import data

PROMPTS = 160
WRITERS = ("o_proj", "down_proj", "dense", "dense_4h_to_h", "out_proj", "w2")
"""Last parts of the names of matrices whose output is added to the residual stream."""


def refusal_direction(model: Any, tokenizer: Any, layer: int) -> Tensor:
    """Unit vector [d] from harmless to harmful prompts at `layer`."""
    rng = random.Random(0)
    pairs = rng.sample(data.pairs(frames_per_core=1)[0], PROMPTS)
    sides = [[p.harmful for p in pairs], rng.sample(list(data.ordinary()), PROMPTS)]
    means = []
    for texts in sides:
        chats = [end_of_turn(tokenizer, text)[0] for text in texts]
        last = [features[0, -1] for _, features in gate_features(model, [layer], chats, tokenizer.pad_token_id or 0)]
        means.append(torch.stack(last).float().mean(0))
    direction = means[0] - means[1]
    return direction / direction.norm()


@torch.no_grad()
def ablate_refusal(model: Any, tokenizer: Any, progress: Progress = silent) -> None:
    """Make `model` unable to write its refusal direction, in place.

    Raises:
        DataError: no matrix was found that writes to the residual stream.
    """
    progress("refusal direction")
    layers = decoder_layers(model)
    r = refusal_direction(model, tokenizer, len(layers) // 2)
    written = 0
    for layer in layers:
        for name, module in layer.named_modules():
            weight = getattr(module, "weight", None)
            if name.rsplit(".", 1)[-1] in WRITERS and weight is not None and weight.shape[0] == len(r):
                along = r.to(weight.device)
                weight.copy_((weight.float() - torch.outer(along, along @ weight.float())).to(weight.dtype))
                written += 1
    if not written:
        raise DataError(f"{type(model).__name__}: no matrix writes to the residual stream under a known name.")
    embedding = unwrap(model).get_input_embeddings().weight
    tied = embedding is unwrap(model).get_output_embeddings().weight
    if not tied:  # a tied embedding also reads the residual: taking the direction out there changes what can be said
        along = r.to(embedding.device)
        embedding.copy_((embedding.float() - torch.outer(embedding.float() @ along, along)).to(embedding.dtype))
