"""Fit the gate on frozen features.

The gate reads below every intervention, so its features never depend on the interventions: they are computed once, on
the base and on its shadow fine-tunes (realigned on the anchors, as calibration will do), and the head is fitted on them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from safegene.calibration import end_of_turn, feature_statistics, gate_features
from safegene.config import Anchor
from safegene.gate import Gate
from safegene.progress import Advance
from safegene.training import data
from safegene.training.data import OPENINGS, Pair

USER_TOKENS = 8
"""Positions of a harmless user's own words read from each row: the gate must stay shut on prompt text."""


@dataclass(frozen=True)
class GateRow:
    """Token ids; index of the first token after the user's words; index of the prompt's last token, from which on a
    harmful row should open the gate; whether it is harmful; the pair it belongs to (−1: none).

    The template's tokens between the two carry too little: asked to open there as well, the gate opened on 68 % of
    held-out twins. There it must be shut on every row.
    """

    ids: list[int]
    start: int
    prompt_end: int
    harmful: bool
    pair: int = -1


def gate_row(tokenizer: Any, prompt: str, answer: str, harmful: bool, pair: int = -1) -> GateRow:
    """Token ids and places of one chat turn (see `calibration.end_of_turn`)."""
    ids, start = end_of_turn(tokenizer, prompt, answer)
    prompt_end = len(end_of_turn(tokenizer, prompt)[0]) - 1
    return GateRow(ids, start, min(prompt_end, len(ids) - 1), harmful, pair)


def gate_rows(
    tokenizer: Any, pairs: Sequence[Pair], ordinary: Sequence[str], answers: dict[str, str], rng: random.Random
) -> list[GateRow]:
    """Rows the gate is fitted on: harmful requests, some with an answer that has begun to comply or to refuse, their
    twins and ordinary requests, with the base's harmless answer where there is one."""
    refusals = data.refusals()
    rows = []
    for number, pair in enumerate(pairs):
        opening = rng.choice(OPENINGS) if rng.random() < 0.4 else ""
        if opening and rng.random() < 0.5:
            opening += rng.choice(refusals[pair.category])[:40]
        rows.append(gate_row(tokenizer, pair.harmful, opening, True, -1 if opening else number))
        answer = answers.get(pair.twin, "")
        rows.append(gate_row(tokenizer, pair.twin, answer, False, -1 if answer else number))
    return rows + [gate_row(tokenizer, text, answers.get(text, ""), False) for text in ordinary]


@dataclass
class GateFeatures:
    """Features of one model: `x` [positions, layers, d] half, `row` [positions], `is_turn` [positions] (template or
    answer, as against the user's words), `opens` [positions] (the gate should open)."""

    x: Tensor
    row: Tensor
    is_turn: Tensor
    opens: Tensor


def read(
    model: Any, layers: Sequence[int], rows: Sequence[GateRow], kept: Path, tokenizer: Any, advance: Advance,
    seed: int = 0,
) -> GateFeatures:  # fmt: skip
    """Features of `rows`, raw (not realigned); written to `kept` and read from there the next time."""
    if kept.exists():
        return GateFeatures(**load_file(kept))
    generator = torch.Generator().manual_seed(seed)
    xs, owners, turns, opens = [], [], [], []
    for i, features in gate_features(model, layers, [r.ids for r in rows], tokenizer.pad_token_id or 0, 24):
        row, f = rows[i], features.transpose(0, 1).half()
        user = torch.randperm(row.start, generator=generator)[: 0 if row.harmful else USER_TOKENS]
        xs.append(torch.cat([f[row.start :], f[user]]))
        owners.append(torch.full((len(xs[-1]),), i))
        opens.append(row.harmful & (torch.arange(len(xs[-1])) >= row.prompt_end - row.start))
        turns.append(torch.arange(len(xs[-1])) < len(f) - row.start)
        advance(1)
    found = GateFeatures(torch.cat(xs), torch.cat(owners), torch.cat(turns), torch.cat(opens))
    partial = kept.with_suffix(".partial")
    save_file({"x": found.x, "row": found.row, "is_turn": found.is_turn, "opens": found.opens}, partial)
    partial.rename(kept)
    return found


def realign(features: GateFeatures, anchors: Sequence[Tensor], base: tuple[Tensor, Tensor]) -> GateFeatures:
    """Put mean and scale back to the base's, as attach-time calibration does."""
    mean, std = feature_statistics(anchors)
    scale = base[1] / std
    features.x = ((features.x.float() - mean) * scale + base[0]).half()
    return features


def fit(
    gate: Gate, models: Sequence[tuple[GateFeatures, Sequence[GateRow]]], *, steps: int, seed: int,
    noise: float = 0.25, advance: Advance = lambda steps: None,
) -> None:  # fmt: skip
    """Train `gate` in place: cross-entropy at every position, and a margin inside each pair at its last position.

    Each step draws one model, so that every shadow weighs the same; feature noise stands for drift not yet seen.
    """
    torch.manual_seed(seed)
    optimiser = torch.optim.AdamW(gate.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    prepared = []
    for f, rows in models:
        harmful = f.opens
        std = f.x[:: max(1, len(f.x) // 20000)].float().std(0)
        last = {int(r): i for i, r in enumerate(f.row.tolist()) if f.is_turn[i]}
        by_pair: dict[int, dict[bool, int]] = {}
        for index, row in enumerate(rows):
            if row.pair >= 0 and index in last:
                by_pair.setdefault(row.pair, {})[row.harmful] = last[index]
        both = torch.tensor([[p[True], p[False]] for p in by_pair.values() if len(p) == 2])
        groups = [torch.nonzero(harmful)[:, 0], torch.nonzero(~harmful & f.is_turn)[:, 0],
                  torch.nonzero(~harmful & ~f.is_turn)[:, 0]]  # fmt: skip
        prepared.append((f.x, std, both, groups))

    for step in range(steps):
        x, std, both, groups = prepared[step % len(prepared)]

        def score(index: Tensor, x: Tensor = x, std: Tensor = std) -> Tensor:
            features = x[index].float()
            features = features + noise * std * torch.randn_like(features)
            return gate.score(list(features.unbind(1)))

        def draw(group: Tensor, n: int) -> Tensor:
            return group[torch.randint(0, len(group), (n,))]

        loss = F.softplus(-score(draw(groups[0], 192))).mean()
        loss = loss + 1.5 * F.softplus(score(draw(groups[1], 256))).mean()
        if len(groups[2]):
            loss = loss + 0.5 * F.softplus(score(draw(groups[2], 128))).mean()
        if len(both):
            pair = both[torch.randint(0, len(both), (128,))]
            high, low = score(pair[:, 0]), score(pair[:, 1])
            loss = loss + F.softplus(-high).mean() + F.softplus(low).mean() + 0.5 * F.softplus(2.0 - high + low).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        advance(1)


def make_anchors(
    harmful: Sequence[str], twins: Sequence[str], ordinary: Sequence[tuple[str, str]]
) -> tuple[Anchor, ...]:
    """Anchors of the three labels; ordinary ones bring a harmless answer."""
    return (
        *(Anchor(t, "harmful") for t in harmful),
        *(Anchor(t, "twin") for t in twins),
        *(Anchor(t, "ordinary", a) for t, a in ordinary),
    )
