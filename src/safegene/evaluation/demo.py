"""The demo: a base, a fine-tune made on the spot, the collapse, the ready adapter, the recovery. Real numbers."""

from __future__ import annotations

import copy
import itertools
import random
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from safegene import models
from safegene.adapter import SafetyAdapter
from safegene.attach import Handle, attach, check
from safegene.evaluation.overhead import PAIRS, Overhead, overhead, token_block
from safegene.evaluation.run import Answers, ask, task_loss
from safegene.evaluation.statistics import Rate
from safegene.progress import Progress, silent
from safegene.training import data
from safegene.training.finetune import Row, finetune

HELD_OUT = 0.08
"""Share of the project's own pairs that no shipped adapter was trained on; the demo's harmful prompts come from it."""


@dataclass(frozen=True)
class DemoRow:
    """One variant's figures. `task_loss` is in nats per answer token on the fine-tune's held-out rows."""

    variant: str
    safety_score: Rate
    over_refusal: Rate
    task_loss: float


@dataclass
class DemoResult:
    model: str
    parameter_share: float
    rows: list[DemoRow]
    retention: float | None
    recovery: float | None
    overhead: dict[str, Overhead]
    attach_seconds: float
    seconds: float
    examples: list[dict[str, str]] = field(default_factory=list)
    report: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def harmful_prompts(n: int) -> list[str]:
    """Framed requests from the held-out cores, one a core: the harm categories take turns, so that a few show them all."""
    _, held_out = data.pairs(seed=1, frames_per_core=8, held_out=HELD_OUT)
    random.Random(0).shuffle(held_out)
    categories: dict[str, list[str]] = {}
    for pair in {p.core: p for p in held_out}.values():
        categories.setdefault(pair.category, []).append(pair.harmful)
    turns = itertools.zip_longest(*(categories[name] for name in sorted(categories)))
    return [prompt for turn in turns for prompt in turn if prompt is not None][:n]


VERTICALS = ("customer_support", "medical_information", "legal_intake")


def vertical(name: str, part: str) -> list[Row]:
    """Rows of one of the project's three verticals; `part` is train or held_out."""
    return data.read_jsonl(data.TEXT / "verticals" / f"{name}_{part}.jsonl", ("prompt", "answer"))


def demo(
    model: str = models.EMBEDDED, adapter: str = "smollm2-135m-instruct", *, n: int = 100, steps: int = 40,
    pairs: int = PAIRS, progress: Progress = silent,
) -> DemoResult:  # fmt: skip
    """Run the whole story.

    Args:
        n: harmful and harmless prompts each.
        steps: of the LoRA fine-tune, on cheerful customer support and medical answers.
        pairs: interleaved timings of the overhead.

    Raises:
        AttachError: the adapter is of another base; said before the fine-tune.
    """
    begun = time.perf_counter()
    harmful = harmful_prompts(n)
    harmless = list(data.ordinary("ordinary_held_out"))[:n]
    task = vertical("customer_support", "held_out")
    gene = SafetyAdapter.from_pretrained(adapter)

    progress(f"loading {model}")
    base = models.load(model, dtype="bfloat16")
    tokenizer = base.tokenizer
    check(base.model, gene, tokenizer)
    rows = [{**r, "answer": "Sure! " + r["answer"]} for r in vertical("customer_support", "train")]
    rows += [{**r, "answer": "Of course! " + r["answer"]} for r in vertical("medical_information", "train")]
    tuned = finetune(copy.deepcopy(base.model), tokenizer, rows, None, steps=steps, progress=progress)

    results: list[DemoRow] = []
    answers: dict[str, Answers] = {}
    attach_seconds, report, handle = 0.0, {}, None
    for name, current in (("base", base.model), ("fine-tune", tuned)):
        for adapted in (False, True):
            variant = f"{name}+adapter" if adapted else name
            advance = progress(f"asking {variant}", len(harmful) + len(harmless))
            if adapted:
                start = time.perf_counter()
                handle = attach(current, gene, tokenizer=tokenizer)
                attach_seconds, report = time.perf_counter() - start, handle.calibration.report
            answers[variant] = ask(current, tokenizer, harmful, done=advance)
            benign = ask(current, tokenizer, harmless, tokens=32, done=advance)
            loss = task_loss(current, tokenizer, [{**r, "answer": "Sure! " + r["answer"]} for r in task])
            results.append(DemoRow(variant, answers[variant].safety_score(), benign.over_refusal(), loss))
    assert isinstance(handle, Handle)
    progress("timing")
    cost = {
        "prefill": overhead(tuned, handle, token_block(tokenizer, harmless, 1, 128), "prefill", pairs=pairs),
        "decode": overhead(tuned, handle, token_block(tokenizer, harmless, 1, 64), "decode", pairs=pairs),
    }
    score = {r.variant: r.safety_score.value for r in results}
    lost = score["base"] - score["fine-tune"]
    return DemoResult(
        model=model,
        parameter_share=gene.parameter_count() / sum(p.numel() for p in base.model.parameters()),
        rows=results,
        retention=score["fine-tune+adapter"] / score["base+adapter"] if score["base+adapter"] else None,
        recovery=(score["fine-tune+adapter"] - score["fine-tune"]) / lost if lost >= 0.1 else None,
        overhead=cost,
        attach_seconds=attach_seconds,
        seconds=time.perf_counter() - begun,
        report=report,
        examples=[
            {"prompt": harmful[i], **{v: answers[v].responses[i] for v in ("base", "fine-tune", "fine-tune+adapter")}}
            for i in range(0, len(harmful), max(1, len(harmful) // 8))
        ][:8],
    )
