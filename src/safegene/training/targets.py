"""What the interventions are trained on: refusals after harmful requests, the base's own answers after harmless ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import Dataset

from safegene.features import end_of_turn
from safegene.training import data, openings
from safegene.training.arguments import TrainingArguments
from safegene.training.data import Pair
from safegene.training.talks import Talk

STRENGTH_RANGE = (0.7, 2.2)
"""α in training: a refusal has to hold where a model pulls harder or less than the base."""

DECISION_TOKENS = 5
"""Whether an answer refuses is settled by its first tokens: rows cut there cost a third, and show three times the variety."""

HARMFUL_SHARE = 0.6
"""More harmful rows than harmless ones: at even shares the interventions answered a third of JailbreakBench."""

TARGET_FRAMES = 10
"""Frames of each core here: the rows cost nothing to keep, and more of them are harder to learn by heart."""

HARMLESS_TOKENS = 24
"""A misfire is judged by how the answer begins."""

QUESTION_SHARE = 0.6
"""Look-alikes that people really type are mostly short questions ("How do I kill a process?"); long instructions about harm
are mostly meant. The twins are as many of each, so questions are drawn more often."""


TWIN_SHARE = 0.65
"""The rest is ordinary requests: the gate rarely opens on them, but where it does they must be answered too."""

LATE_MISFIRES = 0.6
"""Share of the whole harmless rows in which the gate opens for one to four tokens of the answer or of the user's words. Without
it an opening in mid-sentence ("your order, and") had only been seen where a refusal follows: one such token cost 8 nats
(docs/log.md)."""

SUPPORTED = 8
"""How many times as often a request about self-harm is drawn: it is the one refusal whose second sentence matters most."""


CHATS = 0.1
"""Share of the batches in which something was said before. At a fifth they took a third of the time and held a thirteenth of the rows."""

TALKS = 0.5
"""Share of the rows of a batch of chats in which the wish itself was built up over the turns; before the others something else
was said."""


BEGUN = 0.35
"""Share of the batches whose answers have begun to comply."""


class Kind(NamedTuple):
    """What a batch holds: requests from which part of those sorted by length (0 shortest, 1 longest), answered whole or cut after
    the decision, in a chat, in a longer message, with an answer that has begun to comply."""

    at: float
    whole: bool
    chats: bool
    buried: bool
    begun: bool

    @property
    def length(self) -> float:
        """How many times as long as a bare request with a short answer its rows are, roughly."""
        return 3.0 if self.chats else 2.0 if self.buried else 1.5 if self.begun else 1.0


class Targets(Dataset[dict[str, Any]]):
    """What an open gate should lead to. Every index is one batch, drawn from the seed and the index alone, with the model and
    the strength it is read at. Every other batch is many short rows, which decide between refusing and answering, the others
    are fewer whole answers: at one whole batch in three a refusal began well and went on in circles (docs/log.md)."""

    def __init__(
        self, tokenizer: Any, pairs: Sequence[Pair], ordinary: Sequence[str], harmless: Sequence[tuple[str, str]],
        arguments: TrainingArguments, talks: Sequence[Talk] = (),
    ) -> None:  # fmt: skip
        self.tokenizer, self.arguments = tokenizer, arguments
        self.talks = sorted(talks, key=lambda t: sum(len(words) for turn in t.before for words in turn))
        # Where the base itself seems to refuse, there is nothing to learn.
        self.answers = {q: a[:240] for q, a in harmless if not data.looks_like_refusal(a)}
        often = [p for p in pairs if p.category == "self_harm"] * (SUPPORTED - 1)
        self.pairs = sorted([*pairs, *often], key=lambda p: len(p.harmful))
        self.answered = [(q, a) for q, a in self.answers.items() if len(q) < 200]
        self.passages = [a for a in self.answers.values() if len(a) > 60]
        twins = {p.twin for p in pairs}
        # Short rows need no answer of the base: what a misfire begins with is compared at the prompt's end.
        self.ordinary = {
            False: sorted({*ordinary, *self.answers} - twins, key=len),
            True: sorted((q for q in self.answers if q not in twins), key=len),
        }
        self.twins = {False: sorted(twins, key=len), True: sorted(twins & set(self.answers), key=len)}
        self.questions = {
            whole: [q for q in some if q.rstrip().endswith("?") or len(q.split()) < 10]
            for whole, some in self.twins.items()
        }

    def __len__(self) -> int:
        # The Trainer gives each process its share of them.
        return self.arguments.steps * int(PartialState().num_processes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(f"{self.arguments.seed}/{index}")
        whole, at = index % 2 == 1, rng.random()
        # Chats, longer messages and answers that have begun come a whole batch at a time, for one long row would pad all others,
        # and fewer to a batch: with as many chats as other rows a step took 7.4 seconds instead of 2.7. The base has answered bare
        # requests only, so it is short rows that stand in longer messages.
        chats = self.arguments.misfire_training and rng.random() < CHATS
        buried = not whole and bool(self.passages) and self.arguments.misfire_training and rng.random() < data.BURIED
        begun = self.arguments.drift_augmentation and rng.random() < BEGUN
        kind = Kind(at, whole, chats, buried, begun)
        n = max(3, int(self.arguments.rows_per_step / (2 if whole else 1) / kind.length))
        harmful = round(n * HARMFUL_SHARE) if self.arguments.misfire_training else n
        rows = [self._harmful(rng, kind) for _ in range(harmful)]
        rows += [self._harmless(rng, kind) for _ in range(n - harmful)]
        return {"rows": rows, "variant": rng.random(), "strength": rng.uniform(*STRENGTH_RANGE)}

    def _before(self, rng: random.Random, kind: Kind) -> data.History:
        return data.history(self.answered, self.pairs[: len(self.pairs) // 2], rng) if kind.chats else ()

    def _message(self, rng: random.Random, request: str, kind: Kind) -> str:
        return data.buried(self.passages, rng).replace("{request}", request) if kind.buried else request

    def _talk(self, rng: random.Random, kind: Kind) -> Talk | None:
        return rng.choice(window(self.talks, kind.at)) if kind.chats and self.talks and rng.random() < TALKS else None

    def _harmful(self, rng: random.Random, kind: Kind) -> dict[str, list[int]]:
        if talk := self._talk(rng, kind):
            pair, twin_answer, before = talk.pair, talk.twin_answer, talk.before
        else:
            pair, before = rng.choice(window(self.pairs, kind.at)), self._before(rng, kind)
            twin_answer = self.answers.get(pair.twin, "")
        begun = openings.opening(pair, twin_answer, rng) if kind.begun else ""
        answer = data.refusal(pair, rng)
        if begun and rng.random() < 0.5:  # an opening that was broken off in mid-sentence
            begun, answer = begun.rstrip(" :\n"), " " + answer
        return self._row(self._message(rng, pair.harmful, kind), answer, rng, kind, before, begun)

    def _harmless(self, rng: random.Random, kind: Kind) -> dict[str, list[int]]:
        whole = kind.whole
        if talk := self._talk(rng, kind):
            question, answer, before = talk.pair.twin, talk.twin_answer, talk.twin_before
        else:
            questions = self.questions[whole] and rng.random() < QUESTION_SHARE
            twins = self.questions[whole] if questions else self.twins[whole]
            twin = twins and (not self.ordinary[whole] or rng.random() < TWIN_SHARE)
            question = rng.choice(window(twins if twin else self.ordinary[whole], kind.at))
            answer, before = self.answers.get(question, ""), self._before(rng, kind)
        begun = openings.compliant(question, rng) if kind.begun else ""
        begun = begun.rstrip(" :\n") if rng.random() < 0.5 else begun
        return self._row(self._message(rng, question, kind), answer, rng, kind, before, begun, harmful=False)

    def _row(
        self, prompt: str, answer: str, rng: random.Random, kind: Kind, before: data.History = (), begun: str = "",
        harmful: bool = True,
    ) -> dict[str, list[int]]:  # fmt: skip
        ids, after_words = end_of_turn(self.tokenizer, prompt, begun, before)
        target = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        target = [*target, self.tokenizer.eos_token_id] if harmful or not target else target[:HARMLESS_TOKENS]
        target = target if kind.whole else target[:DECISION_TOKENS]
        prompt_end = len(end_of_turn(self.tokenizer, prompt, "", before)[0]) - 1
        # The gate is asked to open at the prompt's end; now and then it opens on the template's tokens before, or wakes
        # late, as it does in an answer that slides into compliance.
        draw, earlier = rng.random(), -1
        if draw < 0.2:
            first = after_words
        elif draw < 0.8 or not begun:
            first = prompt_end
        else:
            first, earlier = rng.randint(min(prompt_end, len(ids) - 1), len(ids) - 1), 0
        last = max(prompt_end, first)
        # Elsewhere the gate is what it is, or, on a model that drifted further, shut again.
        after = rng.choice((-1, -1, -1, 0))
        opened = [earlier] * first + [1] * (last + 1 - first) + [after] * (len(ids) + len(target) - last - 1)
        if kind.whole and not harmful and rng.random() < LATE_MISFIRES:
            words = range(after_words - len(prompt.split()), after_words)
            at = rng.choice(words) if rng.random() < 0.25 else len(ids) + rng.randrange(len(target))
            for i in range(at, min(at + rng.randint(1, 4), len(opened))):
                opened[i] = 1
        labels = [-100] * len(ids) + target
        return {"input_ids": ids + target, "labels": labels, "opened": opened, "harmful": [int(harmful)]}


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
        "harmful": torch.tensor([r["harmful"][0] for r in rows], dtype=torch.bool),
        "draw": torch.tensor([[item["variant"], item["strength"]] for item in batch]),
    }
