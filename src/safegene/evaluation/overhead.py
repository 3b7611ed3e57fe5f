"""What the adapter costs in time and memory: interleaved pairs in one process, prefill and decode apart."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from safegene.adapter import SafetyAdapter
from safegene.attach import Handle, attach
from safegene.models import unwrap
from safegene.progress import Progress, silent
from safegene.training.data import ordinary

Kind = Literal["prefill", "decode", "first token"]
Mode = Literal["eager", "compile", "graphs"]


@dataclass(frozen=True)
class Overhead:
    """Median of (time with ÷ time without − 1) over the pairs, with a bootstrap 95 % interval. `open`: share of positions
    at which the adapter acted. `seconds` and `seconds_without`: median time of a pass with and without it."""

    value: float
    low: float
    high: float
    n: int
    open: float
    seconds: float
    seconds_without: float


def token_block(tokenizer: Any, texts: Sequence[str], rows: int, positions: int) -> Tensor:
    """Running text as token ids, [rows, positions]; starts over at the end of the texts."""
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    wanted = rows * positions
    return torch.tensor((ids * (wanted // len(ids) + 1))[:wanted]).view(rows, positions)


def random_block(model: Any, rows: int, positions: int) -> Tensor:
    """Random token ids, [rows, positions], for a model that has no tokenizer."""
    size = unwrap(model).config.get_text_config().vocab_size
    return torch.randint(size, (rows, positions), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def overhead(
    model: Any, handle: Handle, ids: Tensor, kind: Kind, *, pairs: int, mode: Mode = "eager", seed: int = 0
) -> Overhead:
    """Time `pairs` interleaved passes with and without the adapter.

    Args:
        ids: the tokens of a pass, [rows, positions] (see `token_block`).
        kind: prefill: all of `ids` at once; decode: single-token steps on a cache filled with `ids`; first token: all of `ids` into a
            cache, until the token that follows is known outside the device.
        mode: eager: as the model is; compile: under torch.compile; graphs: under torch.compile with CUDA graphs.
    """
    ids = ids.to(model.device)
    compiled, decode = mode != "eager", kind == "decode"
    next_pass: Callable[[], None] = torch.compiler.cudagraph_mark_step_begin
    # Not for compiled code: what is made in inference mode may not be written into outside of it.
    with torch.inference_mode(not compiled):
        cache = None
        if decode or (compiled and kind == "first token"):
            cache = _filled(model, ids, fixed=compiled)
            if not decode:
                _forget(cache, ids.shape[1])

        def once(call: Callable[..., Any]) -> float:
            if ids.is_cuda:
                torch.cuda.synchronize(ids.device)
            if mode == "graphs":
                next_pass()  # the last pass's outputs may be written over
            start = time.perf_counter()
            out = call(
                input_ids=ids[:, :1] if decode else ids,
                past_key_values=cache,
                use_cache=kind != "prefill",
                logits_to_keep=1,
            )
            if kind == "first token":
                out.logits[:, -1].argmax(-1).tolist()
            if ids.is_cuda:
                torch.cuda.synchronize(ids.device)
            seconds = time.perf_counter() - start
            if cache is not None:
                _forget(cache, 1 if decode else ids.shape[1])
            return seconds

        with handle.recording() as record:
            once(model)
        share = float((record[0] > 0).float().mean())
        adapted, plain = _compiled(model, mode) if compiled else (model, model)

        def on() -> float:
            return once(adapted)

        def off() -> float:
            with handle.disabled():
                return once(plain)

        for _ in range(5):  # of graphs the first compiles, the second records
            on(), off()
        rng, times = random.Random(seed), []
        for _ in range(pairs):
            if rng.random() < 0.5:
                a, b = on(), off()
            else:
                b, a = off(), on()
            times.append((a, b))
    ratios = [a / b - 1 for a, b in times]
    medians = sorted(statistics.median(rng.choices(ratios, k=pairs)) for _ in range(500))
    with_, without = (statistics.median(side) for side in zip(*times, strict=True))
    return Overhead(statistics.median(ratios), medians[12], medians[487], pairs, share, with_, without)


def _filled(model: Any, ids: Tensor, *, fixed: bool) -> Any:
    """A cache that holds `ids` and has room for one token more; of a fixed size, at a fixed place, for compiled code."""
    from transformers import DynamicCache, StaticCache

    config = unwrap(model).config
    cache = StaticCache(config=config, max_cache_len=ids.shape[1] + 1) if fixed else DynamicCache(config=config)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _forget(cache: Any, tokens: int) -> None:
    """Take the last tokens out of a cache again."""
    if cache.is_compileable:  # of a fixed size: it cannot be cropped, the next pass writes over them
        for layer in cache.layers:
            layer.cumulative_length.sub_(tokens)
    else:
        cache.crop(-tokens)


def _compiled(model: Any, mode: Mode) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The model, compiled twice: with the adapter and without. Two functions, because the compiler keeps what it made by function, and
    looks through all of it at every call."""

    def adapted(**inputs: Any) -> Any:
        return model(**inputs)

    def plain(**inputs: Any) -> Any:
        return model(**inputs)

    torch.compiler.reset()  # else a second size would be compiled for all sizes
    how = "reduce-overhead" if mode == "graphs" else None
    return torch.compile(adapted, dynamic=False, mode=how), torch.compile(plain, dynamic=False, mode=how)


def bytes_of(module: nn.Module) -> int:
    """Bytes of its parameters and buffers."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


@torch.inference_mode()
def peak_memory(model: Any, ids: Tensor) -> int:
    """Bytes: on CUDA the most that is allocated during a prefill of `ids` and one step after it, not compiled; elsewhere, where nobody
    counts, the model's parameters and buffers."""
    ids = ids.to(model.device)
    if not ids.is_cuda:
        return bytes_of(model)
    for _ in range(2):  # the first pass also allocates what the libraries keep
        torch.cuda.reset_peak_memory_stats(ids.device)
        cache = _filled(model, ids, fixed=False)
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        torch.cuda.synchronize(ids.device)
        del cache
    return torch.cuda.max_memory_allocated(ids.device)


Size = tuple[Kind, int, int]
"""Kind of pass, rows, positions."""

SIZES: tuple[Size, ...] = (("prefill", 1, 128), ("prefill", 16, 32), ("decode", 1, 128), ("decode", 16, 128))
LARGEST: Size = ("decode", 64, 128)
ALL_SIZES: tuple[Size, ...] = (*SIZES, LARGEST, ("first token", 1, 128))

PAIRS = 200


def overheads(
    model: Any, handle: Handle, tokenizer: Any, *, sizes: Sequence[Size] = SIZES, mode: Mode = "eager", pairs: int = PAIRS,
    progress: Progress = silent,
) -> dict[str, Overhead]:  # fmt: skip
    """`overhead` on ordinary text in every one of `sizes`; without a tokenizer on random tokens."""
    texts = ordinary("ordinary_held_out") if tokenizer else ()
    found = {}
    for kind, rows, positions in sizes:
        progress(f"timing {kind}, batch {rows}")
        ids = token_block(tokenizer, texts, rows, positions) if tokenizer else random_block(model, rows, positions)
        found[f"{kind}, batch {rows}"] = overhead(model, handle, ids, kind, pairs=pairs, mode=mode)
    return found


def costs(
    model: Any, adapter: SafetyAdapter, tokenizer: Any, mode: Mode, *, pairs: int = PAIRS, progress: Progress = silent
) -> tuple[dict[str, int], dict[str, Overhead]]:
    """Attach `adapter` and measure all there is: peak memory in bytes, "with" and "without" it, and `overheads` in `ALL_SIZES`."""
    progress("memory")
    ids = random_block(model, *LARGEST[1:])
    without = peak_memory(model, ids)
    handle = attach(model, adapter, tokenizer=tokenizer)
    beside = 0 if model.device.type == "cuda" else bytes_of(adapter)
    memory = {"with": peak_memory(model, ids) + beside, "without": without}
    found = overheads(model, handle, tokenizer, sizes=ALL_SIZES, mode=mode, pairs=pairs, progress=progress)
    return memory, found
