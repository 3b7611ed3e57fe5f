"""Hidden states at chosen positions of chats: what steering and ablation take their directions from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from safegene.features import end_of_turn
from safegene.models import LoadedModel, decoder_layers

Positions = Literal["last", "answer", "every"]
"""The last token, every token of what of the answer is there, or every token of the chat."""


@torch.no_grad()
def residuals(
    loaded: LoadedModel, chats: Sequence[tuple[str, str]], layers: Sequence[int], positions: Positions = "last"
) -> dict[int, Tensor]:
    """Raw residual after each of `layers` at some positions of every chat (prompt, beginning of the answer); [positions of all
    chats, d] by layer, float32, on the CPU."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    first = 0  # position from which a chat is kept

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            found[layer].append(hidden[0, first:].float().cpu())

        return hook

    stack = decoder_layers(loaded.model)
    hooks = [stack[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        for prompt, begun in chats:
            ids, _ = end_of_turn(loaded.tokenizer, prompt, begun)
            before = len(end_of_turn(loaded.tokenizer, prompt)[0]) if positions == "answer" else 0
            first = len(ids) - 1 if positions == "last" else before
            loaded.model(input_ids=torch.tensor([ids], device=loaded.model.device), use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return {layer: torch.cat(states) for layer, states in found.items()}
