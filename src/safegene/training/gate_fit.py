"""Fit the gate on frozen features.

The gate reads below every intervention, so its features never depend on the interventions: they are computed once, on
the base and on its shadow fine-tunes (realigned on the anchors, as calibration will do), and the head is fitted on them.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from safegene.config import Anchor, AnchorLabel
from safegene.errors import DataError
from safegene.features import end_of_turn, gate_features
from safegene.gate import Gate
from safegene.progress import Advance
from safegene.realignment import Realignment
from safegene.training import data, openings
from safegene.training.data import History, Pair
from safegene.training.talks import Talk

CHATS = 0.08
"""Share of the gate's rows in which something was said before: after a refusal, a gate that had seen single turns alone opened on
the next harmless request, too (docs/log.md). At 0.2 their tokens came to about a third of all that is read, by estimate."""

USER_TOKENS = 8
"""Positions of a harmless user's own words read from each row: the gate must stay shut on prompt text."""


@dataclass(frozen=True)
class GateRow:
    """One chat: token ids; index of the first token after the user's words; index of the prompt's last token, from which
    on a harmful row should open the gate; its label; the pair it belongs to (−1: none); index where the last turn begins; whether
    the request is an order.

    The template's tokens between the two places carry too little to demand an opening there (docs/log.md): on harmful
    rows they are left free, on harmless ones the gate is shut.
    """

    ids: list[int]
    start: int
    prompt_end: int
    label: AnchorLabel
    pair: int = -1
    turn: int = 0
    order: bool = False


def gate_row(
    tokenizer: Any, prompt: str, answer: str, label: AnchorLabel, pair: int = -1, before: History = (),
    order: bool = False,
) -> GateRow:  # fmt: skip
    """Token ids and places of a chat's last turn (see `features.end_of_turn`)."""
    ids, start = end_of_turn(tokenizer, prompt, answer, before)
    prompt_end = len(end_of_turn(tokenizer, prompt, "", before)[0]) - 1
    # Earlier turns may hold a harmful request, on which the gate rightly opened: nothing is asked of it there.
    turn = len(end_of_turn(tokenizer, *before[-1], before[:-1])[0]) if before else 0
    return GateRow(ids, start, min(prompt_end, len(ids) - 1), label, pair, min(turn, start), order)


def gate_rows(
    tokenizer: Any, pairs: Sequence[Pair], ordinary: Sequence[str], answers: dict[str, str],
    rng: random.Random | None, talks: Sequence[Talk] = (),
) -> list[GateRow]:  # fmt: skip
    """Rows the gate is fitted on: harmful requests, some with an answer that has begun to comply or to refuse, their
    twins and ordinary requests, with the base's harmless answer where there is one; the same of conversations, at their last
    turn. The same openings stand before harmless answers, or "Sure" alone would open the gate (docs/log.md), and the same
    earlier turns before both. Without `rng`, single prompts alone."""
    answered = [(q, a) for q, a in answers.items() if len(q) < 200 and not data.looks_like_refusal(a)]

    def earlier() -> History:
        return data.history(answered, pairs, rng) if rng and rng.random() < CHATS else ()

    def harmless(request: str, answer: str) -> str:
        return openings.compliant(request, rng) + answer if rng and rng.random() < 0.4 else answer

    def begun(pair: Pair, twin_answer: str) -> str:
        if not rng or rng.random() > 0.6:
            return ""
        refusal, comply = data.refusal(pair, rng), openings.opening(pair, twin_answer, rng)
        # A refusal is read to its end: where the gate shut inside one, it went on in circles (docs/log.md).
        return rng.choice((refusal, comply, comply + refusal))

    passages = [a for _, a in answered if len(a) > 60]

    def message() -> str:
        return data.buried(passages, rng) if rng and passages and rng.random() < data.BURIED else "{request}"

    rows = []
    for number, pair in enumerate(pairs):
        answer, before, around = answers.get(pair.twin, ""), earlier(), message()
        asked, alike = (around.replace("{request}", text) for text in (pair.harmful, pair.twin))
        order, twin_order = data.is_order(pair.harmful), data.is_order(pair.twin)
        rows.append(gate_row(tokenizer, asked, begun(pair, answer), "harmful", number, before, order))
        rows.append(gate_row(tokenizer, alike, harmless(pair.twin, answer), "twin", number, before, twin_order))
    for number, talk in enumerate(talks, len(pairs)):
        pair, answer = talk.pair, talk.twin_answer
        rows.append(gate_row(tokenizer, pair.harmful, begun(pair, answer), "harmful", number, talk.before))
        rows.append(gate_row(tokenizer, pair.twin, harmless(pair.twin, answer), "twin", number, talk.twin_before))
    for text in ordinary:
        asked = message().replace("{request}", text)
        answer = harmless(text, answers.get(text, ""))
        rows.append(gate_row(tokenizer, asked, answer, "ordinary", -1, earlier(), data.is_order(text)))
    return rows


@dataclass
class GateFeatures:
    """Features of one model: `x` [positions, layers, d] half, `row` [positions], `place` [positions]: −1 the user's words
    and the template, 0 the prompt's last token, 1 the answer."""

    x: Tensor
    row: Tensor
    place: Tensor


def read(
    model: Any, layers: Sequence[int], rows: Sequence[GateRow], kept: Path, tokenizer: Any, advance: Advance,
    seed: int = 0,
) -> GateFeatures:  # fmt: skip
    """Features of `rows`, raw (not realigned); written to `kept` and read from there the next time.

    Raises:
        DataError: `kept` holds the features of other rows: the text has changed since.
    """
    digest = hashlib.sha256(json.dumps([list(layers), [r.ids for r in rows]]).encode()).hexdigest()
    if kept.exists():
        with safe_open(kept, framework="pt") as file:
            if (file.metadata() or {}).get("rows") != digest:
                raise DataError(f"{kept} holds features of other text; remove it, they are then read again.")
        return GateFeatures(**load_file(kept))
    generator = torch.Generator().manual_seed(seed)
    xs, owners, places = [], [], []
    for i, features in gate_features(model, layers, [r.ids for r in rows], tokenizer.pad_token_id or 0, 24):
        row, f = rows[i], features.transpose(0, 1).half()
        where = torch.arange(row.prompt_end, len(f))
        place = (where > row.prompt_end).long()
        if row.label != "harmful":
            user = row.turn + torch.randperm(row.start - row.turn, generator=generator)[:USER_TOKENS]
            shut = torch.cat([user, torch.arange(row.start, row.prompt_end)])
            where, place = torch.cat([where, shut]), torch.cat([place, torch.full((len(shut),), -1)])
        xs.append(f[where])
        places.append(place)
        owners.append(torch.full((len(where),), i))
        advance(1)
    found = GateFeatures(torch.cat(xs), torch.cat(owners), torch.cat(places))
    partial = kept.with_suffix(".partial")
    save_file({"x": found.x, "row": found.row, "place": found.place}, partial, metadata={"rows": digest})
    partial.rename(kept)
    return found


def realign(features: GateFeatures, realignment: Realignment) -> GateFeatures:
    """Put features back to the base's, as attach-time calibration does."""
    for part in features.x.split(50_000):  # in place and in parts: the whole in float32 would not fit beside the model
        for layer in range(part.shape[1]):
            part[:, layer] = realignment.apply(layer, part[:, layer].float()).half()
    return features


class Part(NamedTuple):
    """One part of the gate's loss: which positions, how many a step, their weight, and that of their hardest sixteenth."""

    label: AnchorLabel
    place: int
    n: int
    weight: float
    hardest: float = 0.0


ORDERS = 0.4
"""Share of orders at the prompt's end, of harmful, twin and ordinary rows alike: where ordinary rows held twice as many as harmful ones,
an order was a reason to stay shut (docs/log.md)."""

LOSS = (
    Part("harmful", 0, 384, 4.0), Part("harmful", 1, 256, 0.8), Part("ordinary", 0, 256, 1.0),
    Part("ordinary", 1, 384, 1.0, 1.0), Part("twin", 1, 384, 0.5, 1.0),
    Part("ordinary", -1, 256, 1.0, 1.0), Part("twin", -1, 256, 1.0, 1.0),
)  # fmt: skip
"""Cross-entropy; twins at the prompt's end have their own weight. Inside answers and in the user's own words the hardest
positions count extra: false alarms add up over hundreds of tokens."""


def fit(
    gate: Gate, models: Sequence[tuple[GateFeatures, Sequence[GateRow]]], *, steps: int, seed: int,
    twin_weight: float, noise: float = 0.5, advance: Advance = lambda steps: None,
) -> None:  # fmt: skip
    """Train `gate` in place: cross-entropy at every position, and a margin inside each pair at the prompt's end.

    Each step draws one model, so that every shadow weighs the same; feature noise stands for drift not yet seen. Twins
    weigh less than ordinary requests on purpose: an opening on a twin is made harmless by misfire training, a harmful
    request that is missed is lost.
    """
    torch.manual_seed(seed)
    optimiser = torch.optim.AdamW(gate.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    prepared = []
    for f, rows in models:
        std = f.x[:: max(1, len(f.x) // 20000)].float().std(0)
        labels = [r.label for r in rows]
        of = {label: torch.tensor([own == label for own in labels])[f.row] for label in ("harmful", "twin", "ordinary")}
        order = torch.tensor([r.order for r in rows])[f.row]
        groups = [(_by_form(of[part.label] & (f.place == part.place), order, part.place == 0), part) for part in LOSS]
        ends: dict[int, dict[str, int]] = {}
        for index in torch.nonzero(f.place == 0)[:, 0].tolist():
            row = rows[int(f.row[index])]
            if row.pair >= 0:
                ends.setdefault(row.pair, {})[row.label] = index
        both = torch.tensor([[p["harmful"], p["twin"]] for p in ends.values() if len(p) == 2])
        prepared.append((f.x, std, both, [g for g in groups if g[0]]))

    for step in range(steps):
        x, std, both, groups = prepared[step % len(prepared)]

        def score(index: Tensor, x: Tensor = x, std: Tensor = std) -> Tensor:
            features = x[index].float()
            features = features + noise * std * torch.randn_like(features)
            return gate.score(list(features.unbind(1)))

        loss = torch.zeros(())
        for members, part in groups:
            scores = score(_drawn(members, part.n))
            each = F.softplus(-scores if part.label == "harmful" else scores)
            loss = loss + part.weight * each.mean() + part.hardest * each.topk(part.n // 16).values.mean()
        if len(both):
            pair = both[torch.randint(0, len(both), (256,))]
            high, low = score(pair[:, 0]), score(pair[:, 1])
            loss = (
                loss
                + F.softplus(-high).mean()
                + twin_weight * (F.softplus(low) + 0.5 * F.softplus(2.0 - high + low)).mean()
            )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        advance(1)


def _by_form(members: Tensor, order: Tensor, apart: bool) -> list[tuple[Tensor, float]]:
    """Positions to draw from, with their shares: orders and the rest apart, where there are both; nothing where there are none."""
    kinds = [(members & order, ORDERS), (members & ~order, 1 - ORDERS)] if apart else [(members, 1.0)]
    found = [(torch.nonzero(kind)[:, 0], share) for kind, share in kinds if bool(kind.any())]
    return [(kind, share if len(found) > 1 else 1.0) for kind, share in found]


def _drawn(members: Sequence[tuple[Tensor, float]], n: int) -> Tensor:
    return torch.cat([kind[torch.randint(0, len(kind), (round(n * share),))] for kind, share in members])


def make_anchors(
    harmful: Sequence[str], twins: Sequence[str], ordinary: Sequence[tuple[str, str]]
) -> tuple[Anchor, ...]:
    """Anchors of the three labels; ordinary ones bring a harmless answer."""
    return (
        *(Anchor(t, "harmful") for t in harmful),
        *(Anchor(t, "twin") for t in twins),
        *(Anchor(t, "ordinary", a) for t, a in ordinary),
    )
