"""Conversations for training: the scripted turns of a user, held with the base turn by turn."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safegene import models
from safegene.outputs import write_whole
from safegene.progress import Progress
from safegene.training import data
from safegene.training.data import Conversation, History, Pair

TALK_TOKENS = 24
"""Of every earlier answer: chats of five turns are long enough."""


@dataclass(frozen=True)
class Talk:
    """A conversation that has been held: its last turns as a pair, and all that was said before them.

    `pair.core` holds all of the user's harmful turns: a last turn is often elliptic ("Now the amounts, please").
    """

    pair: Pair
    before: History
    twin_before: History
    twin_answer: str


def hold(
    model: Any, tokenizer: Any, conversations: Sequence[Conversation], kept: Path, seed: int, progress: Progress
) -> list[Talk]:
    """Hold both sides of every conversation with `model`, but for the last harmful turn, which nothing answers. What the
    base said is written to `kept` after every turn; the next time it goes on from there.

    Where a user insists on what was refused ("persistence"), every turn but the first has been refused.
    """
    sides = [
        (f"{i}/{s}", turns) for i, c in enumerate(conversations) for s, turns in (("h", c.harmful[:-1]), ("t", c.twin))
    ]
    said: dict[str, list[str]] = {name: [] for name, _ in sides}
    if kept.exists():
        said = json.loads(kept.read_text(encoding="utf-8"))
    for at in range(max((len(turns) for _, turns in sides), default=0)):
        chats = {
            name: _chat(turns[: at + 1], said[name]) for name, turns in sides if at == len(said[name]) < len(turns)
        }
        if not chats:
            continue
        # Many twins share their first turns word for word with the harmful side: each chat is answered once.
        once = {json.dumps(chat): chat for chat in chats.values()}
        advance = progress(f"conversations with the base, turn {at + 1}", len(once))
        found = models.generate(model, tokenizer, list(once.values()), TALK_TOKENS, done=advance)
        answer_of = dict(zip(once, found, strict=True))
        for name, chat in chats.items():
            said[name].append(answer_of[json.dumps(chat)])
        write_whole(kept, json.dumps(said, ensure_ascii=False))
    rng, talks = random.Random(seed), []
    for i, c in enumerate(conversations):
        pair = Pair(c.category, c.mechanism, c.harmful[-1], c.twin[-1], " ".join(c.harmful))
        answers = said[f"{i}/h"]
        if c.mechanism == "persistence":
            answers = [answers[0], *(data.refusal(pair, rng) for _ in answers[1:])]
        before = tuple(zip(c.harmful[:-1], answers, strict=True))
        *earlier, last = said[f"{i}/t"]
        talks.append(Talk(pair, before, tuple(zip(c.twin[:-1], earlier, strict=True)), last))
    return talks


def _chat(turns: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    chat = [{"role": "user", "content": turns[0]}]
    for answer, turn in zip(answers, turns[1:], strict=True):
        chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
    return chat
