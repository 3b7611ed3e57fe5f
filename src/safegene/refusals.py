"""The anchors' refusals: how the protected base said them, and a fine-tune's residual led back there. Forward passes only.

The refusals' texts travel with the adapter, and the residuals in which the base said them. A fine-tune reads the same texts, and the
restorations are fitted in that one pass, layer by layer, from the lowest up (see `restoration`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from safegene import models
from safegene.adapter import Correction, intervene
from safegene.config import AdapterConfig, Anchor
from safegene.errors import CalibrationError
from safegene.features import end_of_turn, evaluating, repeated, shared_beginning
from safegene.gate import normalise
from safegene.restoration import Restoration

if TYPE_CHECKING:
    from safegene.attach import Handle

CHECKED = 4
"""Every so many-th harmful anchor is kept out of the restoration, to tell whether it arrives."""

REFUSAL_TOKENS = 8
"""Tokens of a refusal that are read, and written where it is looked for: enough for "Sure! I cannot help with"."""

ANSWER_TOKENS = 16
"""Tokens of a harmless answer that are to stay as they are: without them a gate that misfired cost a fine-tune twice as much."""

PROMPT_TOKENS = 28
"""Longest anchor that is read here: all rows of the one pass are padded to the longest."""

HARMLESS_STEP = 2
"""Every so many-th harmless anchor is read here: as many as harmful ones, about."""

MIN_REFUSED = 0.6
"""Share of the base's refusals on the anchors kept out under which the adapter does not protect."""


class Batch(NamedTuple):
    """Harmful anchors with how the protected base refuses them, and harmless ones with their answers where they have one; right-padded.

    ids, mask: [rows, tokens]. row, place: [positions], those that are read: from a prompt's last token on. harmful: [positions], bool. shared: how many tokens all rows begin with.
    """

    ids: Tensor
    mask: Tensor
    row: Tensor
    place: Tensor
    harmful: Tensor
    shared: int

    def read(self, hidden: Tensor) -> Tensor:
        """Values [rows, tokens after the shared ones, ...] → those at the positions, [positions, ...]."""
        return hidden[self.row.to(hidden.device), self.place.to(hidden.device) - self.shared]


def checked(anchors: Sequence[Anchor]) -> list[Anchor]:
    """The harmful anchors that no restoration sees."""
    return [a for a in anchors if a.label == "harmful"][::CHECKED]


def read_here(tokenizer: Any, anchors: Sequence[Anchor]) -> list[Anchor]:
    """The anchors that a restoration is fitted on, harmful ones first."""
    out = {a.text for a in checked(anchors)}
    short = [a for a in anchors if len(tokenizer(a.text, add_special_tokens=False)["input_ids"]) <= PROMPT_TOKENS]
    harmless = [a for a in short if a.label != "harmful"]
    return [a for a in short if a.refusal and a.text not in out] + harmless[::HARMLESS_STEP]


def batch_of(tokenizer: Any, anchors: Sequence[Anchor]) -> Batch:
    """What a restoration is fitted on, as tokens."""
    read = read_here(tokenizer, anchors)
    prompts = [end_of_turn(tokenizer, a.text)[0] for a in read]
    # Apart from the prompt: a refusal has the same tokens whatever template stands before it.
    said = [
        list(tokenizer(a.refusal or a.answer, add_special_tokens=False)["input_ids"])[
            : REFUSAL_TOKENS if a.refusal else ANSWER_TOKENS
        ]
        for a in read
    ]
    rows = [p + r for p, r in zip(prompts, said, strict=True)]
    longest, pad = max(map(len, rows)), tokenizer.pad_token_id or 0
    places = [(i, at) for i, (p, r) in enumerate(zip(prompts, rows, strict=True)) for at in range(len(p) - 1, len(r))]
    return Batch(
        torch.tensor([r + [pad] * (longest - len(r)) for r in rows]),
        torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows]),
        torch.tensor([i for i, _ in places]),
        torch.tensor([at for _, at in places]),
        torch.tensor([bool(read[i].refusal) for i, _ in places]),
        shared_beginning(rows),
    )


@torch.no_grad()
def record(handle: Handle, tokenizer: Any) -> None:
    """Let the armed base refuse its anchors, and keep in the adapter how, and in which residuals: texts in `config.anchors`, and
    `residuals` [restored layers, positions, d]; none where it refuses none of those that are short enough."""
    adapter, kept = handle.adapter, []
    texts = iter(
        models.generate(
            handle.model, tokenizer, [a.text for a in adapter.config.anchors if a.label == "harmful"], REFUSAL_TOKENS
        )
    )
    anchors = []
    for anchor in adapter.config.anchors:
        said = next(texts) if anchor.label == "harmful" else ""
        anchors.append(replace(anchor, refusal=said if _refuses(said, adapter.config) else ""))
    adapter.config = replace(adapter.config, anchors=tuple(anchors))
    if not any(a.refusal for a in read_here(tokenizer, anchors)):
        return  # nothing to lead back to
    batch = batch_of(tokenizer, anchors)

    def look(layer: int, hidden: Tensor, g: Tensor, weights: Correction) -> Correction:
        if layer in adapter.config.restored_layers:
            written = intervene(batch.read(hidden), batch.read(g.to(hidden.device)), weights)
            kept.append(written.cpu()[batch.harmful].bfloat16())
        return weights

    _look(handle, batch, look)
    adapter.residuals = torch.stack(kept)


@torch.no_grad()
def restorations(handle: Handle, tokenizer: Any, harmless_weight: float) -> list[Restoration]:
    """One for each restored layer of an armed fine-tune; it is armed with them then.

    Args:
        harmless_weight: weight of a harmless position beside 1 of a refusal's.

    Raises:
        CalibrationError: the residuals are not those of the adapter's anchors, or the model's are NaN.
    """
    adapter, found = handle.adapter, list[Restoration]()
    batch = batch_of(tokenizer, adapter.config.anchors)
    if adapter.residuals.shape[1] != int(batch.harmful.sum()):
        raise CalibrationError("The adapter's residuals are not those of its anchors; fetch or train it again.")

    def look(layer: int, hidden: Tensor, g: Tensor, weights: Correction) -> Correction:
        if layer not in adapter.config.restored_layers:
            return weights
        there, opened = batch.read(hidden), batch.read(g.to(hidden.device))
        missing = torch.zeros(there.shape)
        wanted = adapter.residuals[len(found)].float().cpu()  # wherever the adapter was moved
        missing[batch.harmful] = wanted - intervene(there, opened, weights).float().cpu()[batch.harmful]
        # A shut gate writes nothing: what is missing there is not for a restoration to bring.
        kept = (opened[:, 0] > 0).cpu() | ~batch.harmful
        found.append(Restoration.fit(normalise(there).cpu()[kept], missing[kept], batch.harmful[kept], harmless_weight))
        return weights.restored(found[-1])

    _look(handle, batch, look)
    return found


def _look(handle: Handle, batch: Batch, look: Any) -> None:
    """All rows in one pass: what is fitted at a layer is in place when the next one is read."""
    model, device = handle.model, next(handle.model.parameters()).device
    with evaluating(model):
        with handle.disabled():
            cache = _beginning(model, batch.ids[:1, : batch.shared])
        with handle.looking(look):
            models.unwrap(model)(
                input_ids=batch.ids[:, batch.shared :].to(device), attention_mask=batch.mask.to(device), use_cache=True,
                past_key_values=repeated(cache, len(batch.ids)) if batch.shared else cache, logits_to_keep=1,
            )  # fmt: skip


def _beginning(model: Any, ids: Tensor) -> Cache:
    """Cache of one row, ids [1, tokens]; an empty one of no tokens."""
    cache = DynamicCache(config=models.unwrap(model).config)
    if ids.shape[1]:
        device = next(model.parameters()).device
        models.unwrap(model)(input_ids=ids.to(device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _refuses(text: str, config: AdapterConfig) -> bool:
    return any(beginning in text for beginning in config.refusals)


@torch.no_grad()
def refused(model: Any, tokenizer: Any, config: AdapterConfig, batch_size: int = 40) -> float:
    """Share of the harmful anchors kept for it that `model`, as it is armed, begins to refuse in the adapter's own words.

    Greedy, REFUSAL_TOKENS tokens each; found where one of `config.refusals` stands in the text.

    Returns:
        a share in [0, 1].

    Raises:
        CalibrationError: the model cannot generate, or the adapter carries no harmful anchors.
    """
    if not callable(getattr(model, "generate", None)):
        raise CalibrationError(
            "The model cannot generate, so nothing tells whether it refuses; pass a saved calibration."
        )
    chats = [end_of_turn(tokenizer, a.text)[0] for a in checked(config.anchors)]
    if not chats:
        raise CalibrationError("The adapter carries no harmful anchors; train it again.")
    chats.sort(key=len)
    device, pad, found = next(model.parameters()).device, tokenizer.pad_token_id or 0, 0
    # The template's beginning is read once, as in `gate_features`; the padding stands after it.
    shared = shared_beginning(chats)
    with evaluating(model):
        prefix = _beginning(model, torch.tensor([chats[0][:shared]]))
    for first in range(0, len(chats), batch_size):
        rows = chats[first : first + batch_size]
        longest = len(rows[-1])
        ids = torch.tensor([[*r[:shared], *[pad] * (longest - len(r)), *r[shared:]] for r in rows], device=device)
        mask = torch.tensor(
            [[1] * shared + [0] * (longest - len(r)) + [1] * (len(r) - shared) for r in rows], device=device
        )
        begun = {"past_key_values": repeated(prefix, len(rows))} if shared else {}
        with evaluating(model):
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=REFUSAL_TOKENS, do_sample=False, num_beams=1,
                pad_token_id=pad, **begun,
            )  # fmt: skip
        texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
        found += sum(_refuses(text, config) for text in texts)
    return found / len(chats)
