"""Generate, judge, count: the figures of one model on one list of prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from safegene import models
from safegene.errors import DataError
from safegene.evaluation.judges import Judge, RuleJudge, Verdict, asked
from safegene.evaluation.statistics import Rate, rate
from safegene.progress import Advance
from safegene.training.finetune import ChatRows, Row, collate

JUDGED_BY = RuleJudge().fingerprint
"""The judge that `ask` asks unless told otherwise: as it runs, whatever is edited meanwhile."""


@dataclass(frozen=True)
class Answers:
    """Prompts, answers and verdicts of one run, kept so that anyone can judge them again."""

    prompts: list[str]
    responses: list[str]
    verdicts: list[Verdict] = field(default_factory=list)

    def safety_score(self) -> Rate:
        """Share of refusals and safe completions; incoherent answers are not safe."""
        return rate([v.safe for v in self.verdicts])

    def over_refusal(self) -> Rate:
        """Share of refusals; for harmless prompts."""
        return rate([v.label == "refusal" for v in self.verdicts])


def ask(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, tokens: int = 48, openings: Sequence[str] = (),
    judge: Judge | None = None, keep: Path | None = None, done: Advance = lambda rows: None,
    answer: Callable[[Sequence[str], int, Advance], list[str]] | None = None,
) -> Answers:  # fmt: skip
    """Greedy answers of `model`, judged by the rules unless told otherwise: what the adapter has to bring back is the refusal, and
    an answer that evades without refusing does not count for it.

    Args:
        openings: text already standing in each answer; the judge sees what the model wrote after it.
        done: called with the number of prompts just answered.
        answer: asks in the model's place (a method that wraps it).
        keep: JSONL file for prompts, answers and verdicts; answers that stand there already are not generated again.

    Raises:
        DataError: `keep` is damaged.
    """
    judge = judge or RuleJudge()
    if answer is not None and openings:
        raise ValueError("a method that wraps the model cannot be prefilled")
    responses = _kept(keep, prompts)
    if responses is None and answer is not None:
        responses = answer(prompts, tokens, done)
    elif responses is None:
        responses = models.generate(model, tokenizer, prompts, tokens, openings=openings, done=done)
    verdicts = [judge.judge(asked(p), r) for p, r in zip(prompts, responses, strict=True)]
    if keep is not None:
        keep.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {"prompt": p, "response": r, "label": v.label, "reason": v.reason}
            for p, r, v in zip(prompts, responses, verdicts, strict=True)
        ]
        part = keep.with_suffix(".part")
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        part.rename(keep)
    return Answers(list(prompts), responses, verdicts)


def judged_again(keep: Path) -> Answers:
    """Answers that `ask` kept, judged by the rules as they are now; their verdicts there are replaced.

    Raises:
        DataError: `keep` is missing or damaged.
    """
    rows = _read(keep, f"remove {keep.parent} and run again")
    return ask(None, None, [prompt for prompt, _ in rows], keep=keep)


def _kept(keep: Path | None, prompts: Sequence[str]) -> list[str] | None:
    if keep is None or not keep.exists():
        return None
    rows = _read(keep, "remove it, its answers are then made again")
    return [response for _, response in rows] if [prompt for prompt, _ in rows] == list(prompts) else None


def _read(keep: Path, remedy: str) -> list[tuple[str, str]]:
    """Prompts and responses."""
    try:
        # An answer may hold any other line separator.
        rows = [json.loads(line) for line in keep.read_text(encoding="utf-8").split("\n") if line]
        return [(str(row["prompt"]), str(row["response"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{keep} is damaged ({error}); {remedy}.") from error


@torch.no_grad()
def task_loss(model: Any, tokenizer: Any, rows: Sequence[Row], batch: int = 8) -> float:
    """Mean cross-entropy per answer token on a fine-tune's held-out rows, in nats."""
    data, total, count = ChatRows(tokenizer, rows), 0.0, 0
    for first in range(0, len(data), batch):
        tensors = collate([data[i] for i in range(first, min(first + batch, len(data)))])
        labels = tensors.pop("labels").to(model.device)
        logits = model(**{k: v.to(model.device) for k, v in tensors.items()}).logits
        keep = labels[:, 1:] != -100
        total += float(F.cross_entropy(logits[:, :-1][keep].float(), labels[:, 1:][keep], reduction="sum"))
        count += int(keep.sum())
    loss = total / count
    if not math.isfinite(loss):
        raise ValueError("The task loss is not finite; check the model's weights.")
    return loss
