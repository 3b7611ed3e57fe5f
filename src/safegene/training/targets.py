"""What the interventions are trained on: refusals after harmful requests, the base's own answers after harmless ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from safegene.calibration import end_of_turn
from safegene.training import data
from safegene.training.arguments import TrainingArguments
from safegene.training.data import Pair

DECISION_TOKENS = 5
"""Whether an answer refuses is settled by its first tokens: rows cut there cost a third, and show three times the variety."""

HARMFUL_SHARE = 0.6
"""More harmful rows than harmless ones: at even shares the interventions answered a third of JailbreakBench."""

QUESTION_SHARE = 0.6
"""Look-alikes that people really type are mostly short questions ("How do I kill a process?"); long instructions about harm
are mostly meant. The twins are as many of each, so questions are drawn more often."""


class Targets(Dataset[dict[str, Any]]):
    """What an open gate should lead to. Every index is one batch, drawn from the seed and the index alone. For two thirds of
    the steps two batches of many short rows, which decide between refusing and answering, and one of fewer whole answers take
    turns; then only whole answers, without which a refusal begins well and ends in babble (docs/log.md)."""

    def __init__(
        self, tokenizer: Any, pairs: Sequence[Pair], harmless: Sequence[tuple[str, str]], arguments: TrainingArguments
    ) -> None:
        self.tokenizer, self.arguments = tokenizer, arguments
        self.refusals = data.refusals()
        # A misfire is judged by how the answer begins; long answers would only fill the batch. Where the base itself seems
        # to refuse, there is nothing to learn.
        self.answers = {q: a[:240] for q, a in harmless if not data.looks_like_refusal(a)}
        twins = {p.twin for p in pairs}
        self.pairs = sorted(pairs, key=lambda p: len(p.harmful))
        self.twins = sorted((q for q in self.answers if q in twins), key=len)
        self.questions = [q for q in self.twins if q.rstrip().endswith("?") or len(q.split()) < 10]
        self.ordinary = sorted((q for q in self.answers if q not in twins), key=len)

    def __len__(self) -> int:
        return self.arguments.steps

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(f"{self.arguments.seed}/{index}")
        whole, at = index % 3 == 2 or index >= 2 * self.arguments.steps // 3, rng.random()
        n = self.arguments.rows_per_step // (2 if whole else 1)
        harmful = round(n * HARMFUL_SHARE) if self.arguments.misfire_training else n
        rows = [self._harmful(rng, at, whole) for _ in range(harmful)]
        for _ in range(n - harmful):
            twins = self.questions if self.questions and rng.random() < QUESTION_SHARE else self.twins
            twin = twins and (not self.ordinary or rng.random() < 0.85)
            question = rng.choice(window(twins if twin else self.ordinary, at))
            rows.append(self._row(question, self.answers[question], rng, whole, end=False))
        return {"rows": rows}

    def _harmful(self, rng: random.Random, at: float, whole: bool) -> dict[str, list[int]]:
        pair = rng.choice(window(self.pairs, at))
        begun = ""
        if self.arguments.drift_augmentation and rng.random() < 0.35:
            begun = data.opening(pair, self.answers.get(pair.twin, ""), rng)
        return self._row(pair.harmful, rng.choice(self.refusals[pair.category]), rng, whole, begun)

    def _row(
        self, prompt: str, answer: str, rng: random.Random, whole: bool, begun: str = "", end: bool = True
    ) -> dict[str, list[int]]:
        ids, after_words = end_of_turn(self.tokenizer, prompt, begun)
        target = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        target = [*target, self.tokenizer.eos_token_id] if end else target
        target = target if whole else target[:DECISION_TOKENS]
        prompt_end = len(end_of_turn(self.tokenizer, prompt)[0]) - 1
        # The gate is asked to open at the prompt's end; now and then it opens on the template's tokens before, or wakes
        # late, as it does in an answer that slides into compliance.
        draw = rng.random()
        if draw < 0.2:
            first = after_words
        elif draw < 0.8 or not begun:
            first = prompt_end
        else:
            first = rng.randint(min(prompt_end, len(ids) - 1), len(ids) - 1)
        opened = [0] * first + [1] * (len(ids) + len(target) - first)
        # A gate read anew at every token may stay open through the answer, flicker, or have done its work at the prompt.
        stays = rng.choice((1.0, 1.0, 0.6, 0.0))
        for place in range(max(prompt_end, first) + 1, len(opened)):
            opened[place] = int(rng.random() < stays)
        return {"input_ids": ids + target, "labels": [-100] * len(ids) + target, "opened": opened}


T = TypeVar("T")


def window(sequence: Sequence[T], at: float, share: float = 0.25) -> Sequence[T]:
    """A quarter of a sorted sequence, from its beginning (at = 0) to its end (at = 1): rows of like length pad little."""
    width = max(1, int(len(sequence) * share))
    first = round(at * (len(sequence) - width))
    return sequence[first : first + width]


def collate(batch: Sequence[dict[str, Any]], pad: int = 0) -> dict[str, Tensor]:
    """Right-padded tensors, [rows, longest]."""
    rows = [row for item in batch for row in item["rows"]]
    longest = max(len(r["input_ids"]) for r in rows)

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([v + [fill] * (longest - len(v)) for v in values])

    return {
        "input_ids": padded([r["input_ids"] for r in rows], pad),
        "attention_mask": padded([[1] * len(r["input_ids"]) for r in rows], 0),
        "labels": padded([r["labels"] for r in rows], -100),
        "opened": padded([r["opened"] for r in rows], 0),
    }
