"""Weight-space SafeGene, which users may take as `fold` (`safegene fold`): mergeable, no cost at inference.

    V_l = W_aligned − W_degraded               the safety vector of layer l, made once per base
    selected                                   the layers whose output differs most between the two on harmful against harmless prompts
    W_l ← W_l + c_l V_l                        c_l, one number a layer, tuned on a few examples of the fine-tune

Source: Wang et al. 2026, arXiv 2606.06519 (after its abstract and digests; no code was published).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safegene import models
from safegene.attach import MAX_DISTANCE
from safegene.baselines.method import SAFETY_DATA, Cost, Method, Protected, Setting, generated, matrices
from safegene.errors import AttachError, DataError
from safegene.features import end_of_turn, gate_features
from safegene.models import LoadedModel, decoder_layers
from safegene.progress import Progress, silent
from safegene.training.finetune import ChatRows, Row, collate

SELECTED = 0.4
"""Share of the layers that get a coefficient."""

EXAMPLES = 32
"""Half refusals, half harmless answers."""

STEPS = 40
CONTRAST_PROMPTS = 48


class Fold(Method):
    """Its output is an ordinary model folder's worth of weights: `save_pretrained` keeps it."""

    name = "fold"
    source = "Wang et al. 2026, arXiv 2606.06519"
    rests_on = (*SAFETY_DATA, "calibration.py")

    def prepare(self, setting: Setting) -> None:
        self.vectors, self.report = setting.lost, setting.surrogate
        self.layers = select(setting.aligned(), setting.degraded(), setting)

    def protect(self, loaded: LoadedModel, setting: Setting) -> Protected:
        vectors, layers = self.vectors, self.layers
        rng = random.Random(4)
        refusals = [row for row in setting.safety_rows if row not in setting.harmless]
        rows = rng.sample(refusals, EXAMPLES // 2) + rng.sample(setting.harmless, EXAMPLES // 2)
        coefficients = tune_coefficients(loaded, vectors, layers, rows, setting.progress("coefficients", STEPS))
        for name, weight in matrices(loaded.model).items():
            if (layer := layer_of(name)) in layers:
                vector = coefficients[layers.index(layer)] * vectors[name].to(weight.device)
                weight.copy_((weight.float() + vector).to(weight.dtype))
        report = {**self.report, **{f"layer_{layer}": c for layer, c in zip(layers, coefficients, strict=True)}}
        return Protected(loaded.model, loaded.tokenizer, generated(loaded), Cost(EXAMPLES, STEPS), report=report)


def fold(model: Any, tokenizer: Any, base: str, kept: str | Path, *, progress: Progress = silent) -> dict[str, float]:
    """Add the base's safety vector to the weights of `model`, a fine-tune of `base`, in place and for good.

    The vector comes from a pair of models that is tuned on the base first, once per base: it stands in `kept` for the next fine-tune.

    Returns:
        `layer_<number>`: the coefficient of each layer that was changed; `aligned_refuses` and `degraded_refuses`: share of 36
        harmful requests that the two models of the pair refuse. Where these are close, the vector holds no refusals.

    Raises:
        AttachError: `model` is no fine-tune of `base`; it is left as it was.
        DataError: the tokenizer has no chat template, or the loss is not finite.
        ModelNotFoundError: nothing is called `base`.
    """
    models.require_chat_template(tokenizer)
    loaded = models.load(base, dtype="bfloat16")
    check(model, loaded)
    folder = Path(kept) / models.weights_digest(loaded.model)[:12]
    del loaded
    setting, method = Setting(base, folder, progress=progress), Fold()
    method.prepare(setting)
    return dict(method.protect(LoadedModel(model, tokenizer, ""), setting).report)


def check(model: Any, base: LoadedModel) -> None:
    """Raises:
    AttachError: `model` has other matrices than `base`, or lies too far from it.
    """
    ours, theirs = ({name: weight.shape for name, weight in matrices(m).items()} for m in (model, base.model))
    if ours != theirs:
        raise AttachError(
            f"The model's matrices are not those of {base.name}; give the base it was tuned from, and a model without unmerged LoRA "
            "or quantisation."
        )
    distance = models.sketch_distance(models.weight_sketch(base.model), models.weight_sketch(model))
    if not distance <= MAX_DISTANCE:
        raise AttachError(
            f"The model's weights lie {distance:.2f} from {base.name} (limit {MAX_DISTANCE}); give the base it was tuned from."
        )


def layer_of(name: str) -> int:
    """Number of the decoder layer that a parameter belongs to."""
    return int(name.split(".layers.", 1)[1].split(".", 1)[0])


def select(aligned: Path, degraded: Path, setting: Setting) -> list[int]:
    """The layers at which aligned and degraded model differ more on harmful prompts than on harmless ones, in order."""
    texts = [[p.harmful for p in setting.pairs[:CONTRAST_PROMPTS]], [p.twin for p in setting.pairs[:CONTRAST_PROMPTS]]]
    ends = []
    for folder in (aligned, degraded):
        loaded = models.load(folder, dtype="bfloat16")
        every = list(range(len(decoder_layers(loaded.model))))
        pad = loaded.tokenizer.pad_token_id or 0
        sides = []
        for some in texts:
            chats = [end_of_turn(loaded.tokenizer, text)[0] for text in some]
            read = dict(gate_features(loaded.model, every, chats, pad))
            sides.append(torch.stack([read[i][:, -1] for i in range(len(chats))], dim=1).float())
        ends.append(sides)
    moved = [(ends[0][side] - ends[1][side]).norm(dim=-1).mean(1) for side in (0, 1)]  # [layers] each
    contrast = moved[0] - moved[1]
    count = max(1, round(SELECTED * len(contrast)))
    return sorted(contrast.topk(count).indices.tolist())


def tune_coefficients(
    loaded: LoadedModel, vectors: dict[str, Tensor], layers: list[int], rows: list[Row], advance: Callable[[int], None]
) -> list[float]:
    """One coefficient a selected layer, by Adam on the rows' cross-entropy; the weights stay frozen."""
    model: Any = loaded.model
    model.requires_grad_(False)
    scales = nn.Parameter(torch.full((len(layers),), 0.5))
    modules = dict(models.unwrap(model).named_modules())
    hooks = []
    for name in matrices(model):
        if (layer := layer_of(name)) in layers:
            hooks.append(
                modules[name.removesuffix(".weight")].register_forward_hook(
                    _adds(scales, layers.index(layer), vectors[name])
                )
            )
    optimiser = torch.optim.Adam([scales], lr=0.1)
    data, rng = ChatRows(loaded.tokenizer, rows), random.Random(5)
    try:
        for _ in range(STEPS):
            batch = collate([data[i] for i in rng.sample(range(len(data)), min(8, len(data)))])
            loss = model(**{k: v.to(model.device) for k, v in batch.items()}).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            advance(1)
    finally:
        for hook in hooks:
            hook.remove()
        model.requires_grad_(True)
    if not bool(scales.isfinite().all()):
        raise DataError("The loss is not finite, so nothing was folded; give the model in float32 or bfloat16.")
    return [float(c) for c in scales.detach().clamp(0, 3)]


def _adds(scales: nn.Parameter, index: int, vector: Tensor) -> Callable[..., Tensor]:
    def hook(_module: nn.Module, args: Any, output: Tensor) -> Tensor:
        added = nn.functional.linear(args[0], vector.to(args[0]))
        return output + scales[index].to(output.dtype) * added

    return hook
