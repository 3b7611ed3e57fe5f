"""What the adapter costs in time: interleaved pairs in one process, prefill and decode apart."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from safegene.attach import Handle


@dataclass(frozen=True)
class Overhead:
    """Median of (time with ÷ time without − 1) over the pairs, with a bootstrap 95 % interval."""

    value: float
    low: float
    high: float
    n: int


@torch.inference_mode()
def overhead(
    model: Any, handle: Handle, *, batch: int, prompt: int, pairs: int, decode: bool, seed: int = 0
) -> Overhead:
    """Time `pairs` interleaved passes with and without the adapter.

    Args:
        batch, prompt: rows and prompt tokens of a pass.
        decode: time single-token steps on a filled cache instead of the prefill.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(5, vocabulary, (batch, prompt), generator=generator).to(model.device)
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
    return Overhead(statistics.median(ratios), medians[12], medians[487], pairs)
