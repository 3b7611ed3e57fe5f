"""Conditional activation steering: where a prompt looks harmful, add the refusal vector while the answer is written.

    condition   cos(h_c, proj_v h_c) of the prompt's mean at layer c, v the first principal direction of harmful − harmless
    behaviour   h_l ← h_l + α |h_l| r_l         r_l = unit(mean h_l(refusing) − mean h_l(complying)), layers 40 to 70 %;
                                                |h_l| the residual's usual size there, read once with r_l

The decision is taken once a request, on its prompt, and kept while it is answered.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safegene import models
from safegene.baselines.method import PROMPT_TOKENS, SAFETY_DATA, Cost, Method, Protected, Setting
from safegene.baselines.states import residuals
from safegene.features import end_of_turn, gate_features
from safegene.models import LoadedModel, decoder_layers
from safegene.progress import Advance
from safegene.training import data, openings

BATCH = 32
PROMPTS = 120

ALPHA = 0.15
"""Of the residual's size, at each of the steered layers: declared, and the same for every base."""


class ConditionalSteering(Method):
    """Vectors and threshold are read on the base, once, and used on the fine-tune as they are: that is the method's promise."""

    name = "cast"
    source = "Lee et al. 2024, arXiv 2409.05907"
    rests_on = (*SAFETY_DATA, "baselines/states.py", "calibration.py")

    def prepare(self, setting: Setting) -> None:
        base = setting.load()
        depth = len(decoder_layers(base.model))
        self.condition, self.steered = round(0.5 * depth), list(range(round(0.4 * depth), round(0.7 * depth)))
        self.direction, self.threshold = condition_of(base, setting, self.condition)
        self.vectors = behaviour(base, setting, self.steered)

    def protect(self, loaded: LoadedModel, setting: Setting) -> Protected:
        condition, steered, direction, vectors = self.condition, self.steered, self.direction, self.vectors
        stack: Any = decoder_layers(loaded.model)
        armed: list[Tensor] = []

        def steer(layer: int) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
                hidden = output[0] if isinstance(output, tuple) else output
                added = (ALPHA * armed[0][: len(hidden), None, None] * vectors[layer]).to(hidden)
                return (hidden + added, *output[1:]) if isinstance(output, tuple) else hidden + added

            return hook

        def answer(prompts: Sequence[str], tokens: int, advance: Advance) -> list[str]:
            texts = [prompt.strip() for prompt in prompts]
            order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
            said = [""] * len(prompts)
            for first in range(0, len(order), BATCH):
                rows = order[first : first + BATCH]
                some = [texts[i] for i in rows]
                # generate sorts by length again, and keeps the order of what is sorted already
                harmful = similarity(loaded, some, condition, direction) > self.threshold
                armed[:] = [harmful.float()]
                hooks = [stack[layer].register_forward_hook(steer(layer)) for layer in steered]
                try:
                    found = models.generate(loaded.model, loaded.tokenizer, some, tokens, batch=BATCH)
                finally:
                    for hook in hooks:
                        hook.remove()
                for i, text in zip(rows, found, strict=True):
                    said[i] = text
                advance(len(rows))
            return said

        parameters = (len(steered) + 1) * len(direction)
        cost = Cost(extra_parameters=parameters, extra_tokens=PROMPT_TOKENS)  # the prompt is read once more to decide
        return Protected(loaded.model, loaded.tokenizer, answer, cost, whole=False)


def prompt_means(loaded: LoadedModel, texts: Sequence[str], layer: int) -> Tensor:
    """Mean of the hidden states over each chat's prompt, [texts, d]."""
    chats = [end_of_turn(loaded.tokenizer, text)[0] for text in texts]
    read = dict(gate_features(loaded.model, [layer], chats, loaded.tokenizer.pad_token_id or 0))
    return torch.stack([read[i][0].float().mean(0) for i in range(len(chats))])


def similarity(loaded: LoadedModel, texts: Sequence[str], layer: int, direction: Tensor) -> Tensor:
    """Cosine between each prompt's mean and its projection on the condition's direction, [texts]."""
    means = prompt_means(loaded, texts, layer)
    return (
        torch.nn.functional.cosine_similarity(means, torch.outer(means @ direction, direction), dim=-1)
        * (means @ direction).sign()
    )


def condition_of(base: LoadedModel, setting: Setting, layer: int) -> tuple[Tensor, float]:
    """The condition's unit direction [d], and the threshold that parts harmful from harmless best on the budget's text."""
    harmful = [p.harmful for p in setting.pairs[:PROMPTS]]
    harmless = random.Random(6).sample(list(data.ordinary()), PROMPTS)
    bad, good = prompt_means(base, harmful, layer), prompt_means(base, harmless, layer)
    spread = torch.cat([bad - good.mean(0), good.mean(0) - good])
    direction = torch.linalg.svd(spread, full_matrices=False).Vh[0]
    direction = direction * ((bad.mean(0) - good.mean(0)) @ direction).sign()
    scores = [similarity(base, texts, layer, direction) for texts in (harmful, harmless)]
    levels = torch.cat(scores)
    right = [(scores[0] > level).float().mean() + (scores[1] <= level).float().mean() for level in levels]
    return direction, float(levels[int(torch.stack(right).argmax())])


def behaviour(base: LoadedModel, setting: Setting, layers: Sequence[int]) -> dict[int, Tensor]:
    """The refusal vector of every steered layer, [d] each: it points from answers that begin to comply to answers that refuse, all
    their tokens taken together, and is as long as the residual usually is there. A raw difference is as long as the two happen
    to lie apart, so that one strength would mean something else at every layer and on every base."""
    rng = random.Random(7)
    pairs = setting.pairs[:PROMPTS]
    refusals = [(p.harmful, data.refusal(p, rng).split(". ")[0] + ".") for p in pairs]  # without the offer that follows
    refusing = residuals(base, refusals, layers, "answer")
    complying = residuals(base, [(p.harmful, openings.compliant(p.harmful, rng)) for p in pairs], layers, "answer")
    return {layer: towards(refusing[layer], complying[layer]) for layer in layers}


def towards(those: Tensor, others: Tensor) -> Tensor:
    """From the mean of `others` to that of `those` [positions, d]: a vector [d] as long as the median state of both."""
    direction = those.mean(0) - others.mean(0)
    size = torch.cat([those, others]).norm(dim=-1).median()
    scaled: Tensor = direction / direction.norm().clamp_min(1e-12) * size
    return scaled
