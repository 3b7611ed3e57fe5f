"""Proof at start-up that the adapter is armed: it changes what it must change, and nothing else.

Read on anchors that travel with the adapter. At the end of a harmful prompt the gate opens, and the next token's logits are not the
unadapted model's; on an ordinary prompt whose gate stays shut they are the same, bit for bit. `/health` shows what was proved.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from safegene.attach import Handle
from safegene.config import AdapterConfig
from safegene.errors import AttachError
from safegene.features import end_of_turn
from safegene.models import LoadedModel

ANCHORS = 8
"""Anchors of each kind that are read: a few seconds on two cores."""

MOST = 0.5
"""More than this share of the harmful ones must open the gate and be changed; calibration has counted all of them."""

MIN_CHANGE = 0.01
"""Largest change of a logit, in standard deviations of the logits, below which nothing was changed: an answer stays as it was."""


def prove(loaded: LoadedModel, handle: Handle) -> dict[str, Any]:
    """Read anchors with and without the adapter. Nothing else may run on the model meanwhile.

    Returns:
        how many anchors of each kind were read, and how many behaved.

    Raises:
        AttachError: the adapter is disarmed, changes nothing, or changes what it must leave alone.
        GateError: the gate's score is NaN.
    """
    start = time.monotonic()
    if handle.model is not loaded.model or not handle.status()["armed"]:
        raise AttachError("The adapter is not armed on this model; attach it again.")
    harmful, ordinary = (spread(handle.adapter.config, label) for label in ("harmful", "ordinary"))
    if not harmful:
        raise AttachError("The adapter carries no harmful anchors to prove itself on; train it again.")
    opened = changed = shut = same = 0
    largest = 0.0
    for text in harmful:
        gate, adapted, plain, end = read(loaded, handle, text)
        change = float((adapted - plain).abs().max() / plain.std())
        is_open = bool(gate[end:].max() > 0)
        opened += is_open
        changed += is_open and change >= MIN_CHANGE  # NaN is no proof
        largest = max(largest, change)
    if not opened > MOST * len(harmful):
        raise AttachError(
            f"The gate opens on only {opened} of {len(harmful)} harmful anchors; calibrate again, or train an adapter for this model."
        )
    if not changed > MOST * len(harmful):
        raise AttachError(
            f"The adapter changes only {changed} of {len(harmful)} answers to harmful anchors; fetch or train it again."
        )
    for text in ordinary:
        gate, adapted, plain, _ = read(loaded, handle, text)
        if gate.max() <= 0:
            shut += 1
            same += torch.equal(adapted, plain)
    if same < shut:
        raise AttachError(
            f"The adapter changes {shut - same} of {shut} ordinary anchors although its gate is shut; report this."
        )
    return {
        "harmful": {"read": len(harmful), "gate_opened": opened, "changed": changed, "largest_change": largest},
        "ordinary": {"read": len(ordinary), "gate_shut": shut, "identical": same},
        "seconds": round(time.monotonic() - start, 2),
    }


def spread(config: AdapterConfig, label: str) -> Sequence[str]:
    """At most ANCHORS prompts of one kind, from the whole list."""
    texts = [anchor.text for anchor in config.anchors if anchor.label == label]
    return texts[:: max(1, len(texts) // ANCHORS)][:ANCHORS]


@torch.inference_mode()
def read(loaded: LoadedModel, handle: Handle, text: str) -> tuple[Tensor, Tensor, Tensor, int]:
    """One prompt with and without the adapter.

    Returns:
        the gate's opening (s − τ) / w [positions]; the next token's logits with the adapter and without [vocabulary], float32;
        the first position after the user's words.
    """
    ids, end = end_of_turn(loaded.tokenizer, text)
    row = torch.tensor([ids], device=loaded.model.device)
    with handle.recording() as record:
        adapted = loaded.model(input_ids=row, use_cache=False).logits[0, -1].float()
    if len(record) != 1:
        raise AttachError("A pass was made in which the gate was not read; attach the adapter again.")
    with handle.disabled():
        plain = loaded.model(input_ids=row, use_cache=False).logits[0, -1].float()
    return record[0][0], adapted, plain, end
