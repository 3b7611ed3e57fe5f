"""Features: what gate and interventions read of a chat. Forward passes only; the hooks are gone when they return."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from safegene.config import Anchor
from safegene.errors import CalibrationError
from safegene.gate import normalise
from safegene.models import decoder_layers, unwrap

_ROLES = ("user", "assistant")


def end_of_turn(
    tokenizer: Any, text: str, answer: str = "", before: Sequence[tuple[str, str]] = ()
) -> tuple[list[int], int]:
    """Token ids of a chat that ends with the user's `text` and what of an answer is there, and the index of the first token
    after the user's words. `before`: what was asked and answered earlier in the chat.

    From that index on, through the template's tokens and the answer, the gate may open.
    """
    if tokenizer.chat_template is None:
        raise CalibrationError("The tokenizer has no chat template; use an instruct model's tokenizer.")
    said = [{"role": role, "content": words} for turn in before for role, words in zip(_ROLES, turn, strict=True)]
    chat = [*said, {"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    end = rendered.rfind(text.strip()) + len(text.strip())
    encoded = tokenizer(rendered + answer, add_special_tokens=False, return_offsets_mapping=True)
    start = next((i for i, (a, _) in enumerate(encoded["offset_mapping"]) if a >= end), len(encoded["input_ids"]) - 1)
    return list(encoded["input_ids"]), start


def shared_beginning(sequences: Sequence[list[int]]) -> int:
    """How many tokens all sequences begin with; every one has another after them."""
    low, high = min(s[:-1] for s in sequences), max(s[:-1] for s in sequences)
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


def repeated(prefix: Cache, rows: int) -> Cache:
    """A copy of the cache of one row, for a batch of `rows`."""
    cache = copy.deepcopy(prefix)
    cache.batch_repeat_interleave(rows)
    return cache


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradient checkpointing, whatever the model was doing; each module goes back to it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Reached(Exception):
    """The last gate layer was read; the rest of the pass is not needed."""


@torch.no_grad()
def gate_features(
    model: Any, layers: Sequence[int], sequences: Sequence[list[int]], pad: int, batch_size: int = 16
) -> Iterator[tuple[int, Tensor]]:
    """Read the gate's input, stopping each pass at the last gate layer.

    Yields:
        (index of the sequence, features [gate layers, positions, d]), shortest sequences first.
    """
    stack, outer = decoder_layers(model), unwrap(model)
    device = next(model.parameters()).device
    kept: list[Tensor] = []

    def hook(_module: Any, _args: Any, output: Any) -> None:
        kept.append(normalise(output[0] if isinstance(output, tuple) else output))
        if len(kept) == len(layers):
            raise _Reached

    def read(ids: Tensor, mask: Tensor, cache: Cache | None) -> Tensor:
        kept.clear()
        with contextlib.suppress(_Reached):
            outer(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return torch.stack([k.cpu() for k in kept])

    hooks = [stack[layer].register_forward_hook(hook) for layer in layers]
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    try:
        # Every chat begins with the template's same tokens, a third of a short one: they are read once.
        shared = shared_beginning(sequences)
        prefix = DynamicCache(config=outer.config)
        head = torch.empty(0)
        if shared:
            head = read(torch.tensor([sequences[0][:shared]]), torch.ones(1, shared, dtype=torch.long), prefix)[:, 0]
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            longest = len(sequences[rows[-1]])
            ids = torch.full((len(rows), longest), pad)
            mask = torch.zeros((len(rows), longest), dtype=torch.long)
            for r, i in enumerate(rows):  # right padding: a causal model's real positions do not see it
                ids[r, : len(sequences[i])] = torch.tensor(sequences[i])
                mask[r, : len(sequences[i])] = 1
            features = read(ids[:, shared:], mask, repeated(prefix, len(rows)) if shared else None)
            for r, i in enumerate(rows):
                own = features[:, r, : len(sequences[i]) - shared]
                yield i, torch.cat([head, own], dim=1) if shared else own
    finally:
        for h in hooks:
            h.remove()


def read_anchors(model: Any, layers: Sequence[int], tokenizer: Any, anchors: Sequence[Anchor]) -> list[Tensor]:
    """Features of every anchor from the prompt's last token on, [layers, positions, d] each, in the anchors' order."""
    last = [len(end_of_turn(tokenizer, a.text)[0]) - 1 for a in anchors]
    ends = [end_of_turn(tokenizer, a.text, a.answer) for a in anchors]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    read: dict[int, Tensor] = {}
    for i, features in gate_features(model, layers, [ids for ids, _ in ends], pad or 0):
        read[i] = features[:, min(last[i], features.shape[1] - 1) :]
    return [read[i] for i in range(len(anchors))]


def at_prompt_end(features: Sequence[Tensor]) -> Tensor:
    """The anchors' last prompt tokens, [layers, anchors, d]: what realignment is fitted on.

    One kind of position only: pooled over template and answer tokens, which differ more from each other than harmful
    from harmless, the realignment lost the gate on a fine-tune (anchor AUC 0.64).
    """
    return torch.stack([f[:, 0] for f in features], dim=1)
