"""What the interventions are trained on: refusals after harmful requests, the base's own answers after harmless ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from safegene.calibration import end_of_turn
from safegene.training import data
from safegene.training.arguments import TrainingArguments
from safegene.training.data import OPENINGS, Pair


class Targets(Dataset[dict[str, Any]]):
    """What an open gate should lead to. Every index is one mixed batch, drawn from the seed and the index alone."""

    def __init__(
        self, tokenizer: Any, pairs: Sequence[Pair], harmless: Sequence[tuple[str, str]], arguments: TrainingArguments
    ) -> None:
        self.tokenizer, self.pairs, self.arguments = tokenizer, pairs, arguments
        # A misfire is judged by how the answer begins; long answers would only fill the batch.
        self.harmless = [(q, a[:240]) for q, a in harmless]
        self.refusals = data.refusals()

    def __len__(self) -> int:
        return self.arguments.steps

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(f"{self.arguments.seed}/{index}")
        n = self.arguments.rows_per_step
        share = n // 2 if self.arguments.misfire_training else n
        rows = [self._harmful(rng) for _ in range(share)]
        rows += [self._row(*rng.choice(self.harmless), rng, end=False) for _ in range(n - share)]
        return {"rows": rows}

    def _harmful(self, rng: random.Random) -> dict[str, list[int]]:
        pair = rng.choice(self.pairs)
        refusal = rng.choice(self.refusals[pair.category])
        opening = rng.choice(OPENINGS) if self.arguments.drift_augmentation and rng.random() < 0.45 else ""
        return self._row(pair.harmful, refusal, rng, opening)

    def _row(
        self, prompt: str, answer: str, rng: random.Random, opening: str = "", end: bool = True
    ) -> dict[str, list[int]]:
        ids, _ = end_of_turn(self.tokenizer, prompt, opening)
        target = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        target = [*target, self.tokenizer.eos_token_id] if end else target
        prompt_end = len(end_of_turn(self.tokenizer, prompt)[0]) - 1
        # Now and then the gate wakes late, as it does in an answer that slides into compliance.
        first = prompt_end if rng.random() < 0.6 else rng.randint(min(prompt_end, len(ids) - 1), len(ids) - 1)
        opened = [0] * first + [1] * (len(ids) + len(target) - first)
        if rng.random() < 0.3:  # a gate read anew at every token flickers on the refusal's own words
            opened[len(ids) :] = [int(rng.random() < 0.7) for _ in target]
        return {"input_ids": ids + target, "labels": [-100] * len(ids) + target, "opened": opened}


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
