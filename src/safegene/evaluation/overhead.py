"""What the adapter costs in time: interleaved pairs in one process, prefill and decode apart."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safegene.attach import Handle
from safegene.progress import Progress, silent
from safegene.training.data import ordinary


@dataclass(frozen=True)
class Overhead:
    """Median of (time with ÷ time without − 1) over the pairs, with a bootstrap 95 % interval. `open`: share of positions
    at which the adapter acted."""

    value: float
    low: float
    high: float
    n: int
    open: float


def token_block(tokenizer: Any, texts: Sequence[str], rows: int, positions: int) -> Tensor:
    """Running text as token ids, [rows, positions]; starts over at the end of the texts."""
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    wanted = rows * positions
    return torch.tensor((ids * (wanted // len(ids) + 1))[:wanted]).view(rows, positions)


@torch.inference_mode()
def overhead(model: Any, handle: Handle, ids: Tensor, *, pairs: int, decode: bool, seed: int = 0) -> Overhead:
    """Time `pairs` interleaved passes with and without the adapter.

    Args:
        ids: the tokens of a pass, [rows, positions] (see `token_block`).
        decode: time single-token steps on a cache filled with `ids` instead of the prefill.
    """
    ids = ids.to(model.device)
    rng = random.Random(seed)
    cache: Any = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values if decode else None

    def once() -> float:
        start = time.perf_counter()
        if decode:
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
            cache.crop(-1)
        else:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def off() -> float:
        with handle.disabled():
            return once()

    with handle.recording() as record:
        once()
    share = float((record[0] > 0).float().mean())
    for _ in range(3):
        once(), off()
    ratios = []
    for _ in range(pairs):
        if rng.random() < 0.5:
            a, b = once(), off()
        else:
            b, a = off(), once()
        ratios.append(a / b - 1)
    medians = sorted(statistics.median(rng.choices(ratios, k=pairs)) for _ in range(500))
    return Overhead(statistics.median(ratios), medians[12], medians[487], pairs, share)


SHAPES = (("prefill", 1, 128), ("prefill", 16, 32), ("decode", 1, 128), ("decode", 16, 128))
"""Kind of pass, rows, positions."""

PAIRS = 200


def overheads(
    model: Any, handle: Handle, tokenizer: Any, *, pairs: int = PAIRS, progress: Progress = silent
) -> dict[str, Overhead]:
    """`overhead` on ordinary text in every one of `SHAPES`."""
    texts = ordinary("ordinary_held_out")
    found = {}
    for kind, rows, positions in SHAPES:
        progress(f"timing {kind}, batch {rows}")
        ids = token_block(tokenizer, texts, rows, positions)
        found[f"{kind}, batch {rows}"] = overhead(model, handle, ids, pairs=pairs, decode=kind == "decode")
    return found
