"""What a fine-tune can still do, beside its task loss: multiple-choice questions of public sets, scored by the likelihood of their
options, and its own task, where answers can be compared word for word.

The sets are read from the folder of public data; none of their rows is kept in the project or trained on.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from safegene.baselines import Protected
from safegene.errors import DataError
from safegene.evaluation.public import read
from safegene.evaluation.run import ask
from safegene.progress import Advance, Progress
from safegene.training.finetune import ChatRows, Row, collate

SETS = {"ARC easy": "arc", "ARC challenge": "arc", "MMLU": "mmlu"}
"""Name of a set → its folder. ARC: Clark et al. 2018, arXiv 1803.05457; MMLU: Hendrycks et al. 2021, arXiv 2009.03300 (its test part,
57 subjects)."""

PER_SET = 50
LONGEST = 400
"""Characters of a question at most: MMLU's law is ten times as long, and takes as much longer."""

OWN_TASK = "own task"
TASK_ROWS = 60
SHORT = 5
"""Words of an answer that can be compared word for word, at most: a label, a date, a figure, a few of them."""
SHORT_TOKENS, NUMBER_TOKENS = 24, 256
"""New tokens of such an answer at most, and of a calculation that ends in a number."""

_OPTION = re.compile(r"[A-E1-5]\. ")
_FINAL = re.compile(r"####\s*(-?[\d.,]*\d)\s*$")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Question:
    """A question and its options; `right` is the index of the right one."""

    text: str
    options: tuple[str, ...]
    right: int


def questions(folder: Path) -> dict[str, list[Question]]:
    """By set, `PER_SET` questions in the order of their hashes, so that no subject is favoured; a set that `folder` does not hold is
    left out.

    Raises:
        DataError: a set that is there is damaged.
    """
    found: dict[str, list[Question]] = {}
    for name, place in SETS.items():
        if (folder / place).is_dir():
            try:
                read_set = _mmlu(folder) if name == "MMLU" else _arc(folder, name.removeprefix("ARC "))
                # A question that stands there twice (with other options) is asked once.
                short = {q.text: q for q in read_set if len(q.text) <= LONGEST and all(q.options)}
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                raise DataError(f"{folder / place} lacks what {name} has ({error}); fetch the set again.") from error
            order = sorted(short, key=lambda text: hashlib.sha256(text.encode()).digest())
            found[name] = [short[text] for text in order[:PER_SET]]
    return found


def _arc(folder: Path, part: str) -> Iterable[Question]:
    """A question's last lines are its options, marked A. to E. or 1. to 5.; the target is one of them, whole."""
    for row in read(folder / "arc" / f"arc-{part}.json")["examples"]:
        lines = row["input"].rstrip("\n").split("\n")
        marked = list(itertools.takewhile(_OPTION.match, reversed(lines)))[::-1]
        text = "\n".join(lines[: -len(marked)])
        yield Question(text, tuple(line[3:] for line in marked), marked.index(row["target"]))


def _mmlu(folder: Path) -> Iterable[Question]:
    for path in sorted((folder / "mmlu" / "test").glob("*.csv")):
        for row in read(path):
            yield Question(row["question"], tuple(row[f"choice{i}"] for i in range(4)), int(row["answer"]))


@torch.no_grad()
def choose(
    model: Any, tokenizer: Any, asked: Sequence[Question], *, batch: int = 16, done: Advance = lambda rows: None
) -> list[bool]:
    """Whether the right option is the likeliest answer to the question in a chat: the highest log-likelihood a character (lm-eval's
    acc_norm). The model is not shown the options.

    Args:
        batch: options read at once.
        done: called with the number of options just read.

    Raises:
        ValueError: a likelihood is not finite.
    """
    rows = [{"prompt": q.text, "answer": option} for q in asked for option in q.options]
    chats = ChatRows(tokenizer, rows, longest=4 * LONGEST).rows  # characters as tokens: nothing is cut off
    # Without the token that ends an answer: how the option begins and goes on is asked, not whether it ends there.
    chats = [{key: ids[:-1] for key, ids in chat.items()} for chat in chats]
    scores = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(chats[i]["input_ids"]))  # alike lengths pad little
    for first in range(0, len(order), batch):
        some = order[first : first + batch]
        tensors = collate([chats[i] for i in some])
        labels = tensors.pop("labels").to(model.device)[:, 1:]
        logits = model(**{k: v.to(model.device) for k, v in tensors.items()}, use_cache=False).logits[:, :-1]
        keep = labels != -100
        losses = F.cross_entropy(logits[keep].float(), labels[keep], reduction="none")
        totals = torch.zeros(len(some), device=losses.device).index_add_(0, keep.nonzero()[:, 0], losses)
        for i, total in zip(some, totals.tolist(), strict=True):
            scores[i] = -total / len(rows[i]["answer"])
        done(len(some))
    if not all(map(math.isfinite, scores)):
        raise ValueError("An option's likelihood is not finite; check the model's weights.")
    left = iter(scores)
    by_question = [list(itertools.islice(left, len(q.options))) for q in asked]
    return [max(range(len(s)), key=s.__getitem__) == q.right for q, s in zip(asked, by_question, strict=True)]


def exact_rows(rows: Sequence[Row]) -> list[Row]:
    """`TASK_ROWS` held-out rows at most whose answers can be compared: calculations that end in "#### number" (GSM8K), or, where these
    are at least half of the task, answers of `SHORT` words. None: such a task has its loss alone."""
    numbers = [row for row in rows if _FINAL.search(row["answer"])]
    short = [row for row in rows if len(row["answer"].split()) <= SHORT]
    chosen = numbers or (short if 2 * len(short) >= len(rows) else [])
    return list({row["prompt"]: row for row in chosen}.values())[:TASK_ROWS]


def exact_tokens(rows: Sequence[Row]) -> int:
    """New tokens that answers to `exact_rows` may take."""
    return NUMBER_TOKENS if any(_FINAL.search(row["answer"]) for row in rows) else SHORT_TOKENS


def is_exact(expected: str, said: str) -> bool:
    """Whether an answer is the expected one: its final number, or all of its words, case and punctuation aside.

    The final number stands after ####; where an answer lacks that, it is the last number in it.
    """
    if final := _FINAL.search(expected):
        after = said.rpartition("####")[2]
        numbers = _NUMBER.findall(after)
        number = numbers[0 if "####" in said else -1] if numbers else ""
        return bool(number) and float(number.replace(",", "")) == float(final[1].replace(",", ""))
    return _plain(expected) == _plain(said)


def _plain(text: str) -> str:
    """Words and figures in small letters; of the rest the signs that make another figure."""
    return " ".join(re.findall(r"-?[\w.%]*[\w%]", text.casefold()))


def measured(
    protected: Protected,
    asked: Mapping[str, Sequence[Question]],
    held_out: Sequence[Row],
    folder: Path,
    progress: Progress,
) -> dict[str, dict[str, bool]]:
    """By set and question, whether a protected fine-tune is right; `OWN_TASK` is the set of its own held-out prompts.

    Where something stands around the model, likelihoods would be the bare model's: such a method is asked its own task alone.

    Args:
        folder: where the answers of the own task are kept.
    """
    found: dict[str, dict[str, bool]] = {}
    for name, some in asked.items() if protected.whole else ():
        advance = progress(name, sum(len(q.options) for q in some))
        right = choose(protected.model, protected.tokenizer, some, done=advance)
        found[name] = dict(zip((q.text for q in some), right, strict=True))
    if rows := exact_rows(held_out):
        prompts, advance = [row["prompt"] for row in rows], progress(OWN_TASK, len(rows))
        answers = ask(
            protected.model, protected.tokenizer, prompts, tokens=exact_tokens(rows), keep=folder / "own-task.jsonl",
            done=advance, answer=protected.answer,
        )  # fmt: skip
        both = zip(rows, answers.responses, strict=True)
        found[OWN_TASK] = {row["prompt"]: is_exact(row["answer"], said) for row, said in both}
    return found
