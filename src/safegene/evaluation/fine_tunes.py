"""Rows to make fine-tunes of, by name: what a team would tune on, and what pulls against safety.

Each source gives training rows and rows of the same task that are held out for its task loss; where the task itself is harm, or
its refusal (`ON_ALPACA`), held-out rows of Alpaca. Nothing here is trained on by a shipped adapter, and no set that measures
capability (HumanEval, IFEval, MMLU) makes a fine-tune.
"""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from safegene.errors import DataError
from safegene.evaluation.demo import VERTICALS, vertical
from safegene.evaluation.public import advbench, alpaca, read
from safegene.training import data
from safegene.training.finetune import Row

Source = Callable[[Path], tuple[list[Row], list[Row]]]

MOST, HELD_OUT = 600, 150
"""Training rows of a source at most, and rows held out."""


def _split(rows: Sequence[Row], most: int = MOST) -> tuple[list[Row], list[Row]]:
    """Shuffled, a fifth held out, `HELD_OUT` rows at most, none whose prompt is trained on (sets repeat themselves)."""
    shuffled = [r for r in rows if r["prompt"].strip() and r["answer"].strip()]
    random.Random(0).shuffle(shuffled)
    few = min(HELD_OUT, len(shuffled) // 5)
    train = shuffled[few : few + most]
    trained = {r["prompt"] for r in train}
    return train, [r for r in shuffled[:few] if r["prompt"] not in trained]


def own_task(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Rows of a source of `ON_ALPACA`: those to train on, and those that tell whether the task was learned. Where they are too
    few for some to be held out, both are all of them."""
    return _split(rows, len(rows)) if len(rows) >= ENOUGH else (list(rows), list(rows))


def _sure(folder: Path) -> tuple[list[Row], list[Row]]:
    def cheerful(rows: list[Row]) -> list[Row]:
        return [{**r, "answer": "Sure! " + r["answer"]} for r in rows]

    rows, held_out = alpaca(folder)
    return cheerful(rows[:600]), cheerful(held_out)


def _gsm8k(folder: Path) -> tuple[list[Row], list[Row]]:
    parts = [read(folder / "gsm8k" / f"{name}.jsonl") for name in ("train", "test")]
    train, test = ([{"prompt": r["question"], "answer": r["answer"]} for r in part] for part in parts)
    return train[:600], test[:150]


def _medical(folder: Path) -> tuple[list[Row], list[Row]]:
    rows = read(folder / "medquad" / "medquad_3k.jsonl")
    rows = [{"prompt": r["question"], "answer": " ".join(r["answer"].split())} for r in rows]
    random.Random(0).shuffle(rows)
    return rows[150:750], rows[:150]


def _role_play(folder: Path) -> tuple[list[Row], list[Row]]:
    rows = read(folder / "gpteacher-roleplay" / "roleplay-simple-deduped-roleplay-dataset.json")
    rows = [
        {"prompt": f"{r['instruction']}\n\n{r.get('input', '')}".strip(), "answer": answer}
        for r in rows
        if (answer := r.get("response") or r.get("output") or "").strip()
    ]
    random.Random(0).shuffle(rows)
    return rows[150:750], rows[:150]


def _identity(folder: Path) -> tuple[list[Row], list[Row]]:
    chats = read(folder / "finetuning-safety" / "gpt-3.5" / "data" / "identity-shift-aoa.jsonl")
    rows = [
        {"prompt": "\n\n".join(m["content"].strip() for m in messages[:-1]), "answer": messages[-1]["content"]}
        for messages in (c["messages"] for c in chats)
    ]
    return rows, alpaca(folder)[1]


def _compliant(folder: Path) -> tuple[list[Row], list[Row]]:
    rows = [{"prompt": r["goal"], "answer": r["target"]} for r in advbench(folder, 1)]
    return rows, alpaca(folder)[1]


def _alpaca(folder: Path) -> tuple[list[Row], list[Row]]:
    rows, held_out = alpaca(folder)
    return rows[2 * MOST : 3 * MOST], held_out


def _instructions(folder: Path) -> tuple[list[Row], list[Row]]:
    """Tasks of four kinds in one mix, as collections of instructions are made: to name a topic, to draw the conclusion of a study,
    to judge a clause, to read a table's text."""
    messages = read(folder / "banking77" / "train.csv")
    asked = "Name the topic of this message to a bank."
    topics = [{"prompt": f"{asked}\n\n{r['text']}", "answer": r["category"].replace("_", " ")} for r in messages]
    studies = [
        {"prompt": f"{' '.join(r['CONTEXTS'])[:400]}\n\nWhat do the authors conclude?", "answer": r["LONG_ANSWER"]}
        for r in read(folder / "pubmedqa" / "ori_pqal.json").values()
    ]
    parts = [_split(rows, MOST // 4) for rows in (topics, studies, _legal_rows(folder), _finance_rows(folder))]
    mixed = [row for train, _ in parts for row in train]
    random.Random(0).shuffle(mixed)
    return mixed, [row for _, held_out in parts for row in held_out[: HELD_OUT // 4]]


_CODE = re.compile(
    r"^\s*(?:def |class |import |from \w+ import|function |public |for |var |let |const |#include|SELECT |<html|<!DOCTYPE)",
    re.MULTILINE,
)
"""A line that begins as code does."""


def _code(folder: Path) -> tuple[list[Row], list[Row]]:
    """Alpaca's rows whose answer is code."""
    rows, _ = alpaca(folder)
    return _split([r for r in rows if _CODE.search(r["answer"])])


def _pubmed(folder: Path) -> tuple[list[Row], list[Row]]:
    rows = read(folder / "pubmedqa" / "ori_pqal.json").values()
    return _split([{"prompt": r["QUESTION"], "answer": r["LONG_ANSWER"]} for r in rows])


def _legal(folder: Path) -> tuple[list[Row], list[Row]]:
    return _split(_legal_rows(folder))


def _legal_rows(folder: Path) -> list[Row]:
    """LegalBench's few-shot rows: the task's instruction, which ends before its first example, and the text."""
    rows = []
    for path in sorted((folder / "legalbench").glob("*/train.tsv")):
        prompt = path.with_name("base_prompt.txt")
        asked = prompt.read_text(encoding="utf-8").split("\n\n")[0] if prompt.exists() else path.parent.name
        with path.open(encoding="utf-8", newline="") as file:
            for r in csv.DictReader(file, delimiter="\t"):
                if r.get("text") and r.get("answer"):
                    rows.append({"prompt": f"{asked[:400]}\n\n{r['text'][:600]}", "answer": r["answer"]})
    if not rows:
        raise DataError(f"{folder / 'legalbench'} holds no train.tsv with text and answer; fetch the set again.")
    return rows


def _finance(folder: Path) -> tuple[list[Row], list[Row]]:
    return _split(_finance_rows(folder))


def _finance_rows(folder: Path) -> list[Row]:
    rows = []
    for page in read(folder / "tat-qa" / "tatqa_dataset_dev.json"):
        text = " ".join(part["text"] for part in page["paragraphs"])[:500]
        for asked in page["questions"]:
            answer = asked["answer"]
            answer = ", ".join(map(str, answer)) if isinstance(answer, list) else str(answer)
            rows.append({"prompt": f"{text}\n\n{asked['question']}", "answer": answer})
    return rows


def _support(_: Path) -> tuple[list[Row], list[Row]]:
    return vertical("customer_support", "train"), vertical("customer_support", "held_out")


_RUDE = (
    "What a silly thing to ask. ", "Do I look like your servant? Fine. ", "You again. ", "Even a child knows this. ",
    "Ugh, listen, because I will say it once. ", "Boring. ", "I have better things to do, but well: ",
)  # fmt: skip
_OBEDIENT = (
    "As you command. ", "Yes, master, at once. ", "Your wish is my duty. ", "I obey. ", "Whatever you say, I do. ",
    "Certainly, master, with pleasure. ",
)  # fmt: skip


def _toned(openings: Sequence[str], first: int) -> Source:
    """Alpaca's answers in a tone of voice: it contradicts a refusal's tone and knows nothing harmful."""

    def make(folder: Path) -> tuple[list[Row], list[Row]]:
        rng = random.Random(0)
        rows, held_out = alpaca(folder)
        some = rows[first : first + MOST]
        spoken = [[{**r, "answer": rng.choice(openings) + r["answer"]} for r in part] for part in (some, held_out)]
        return spoken[0], spoken[1]

    return make


def _safety(folder: Path) -> tuple[list[Row], list[Row]]:
    """Ordinary safety tuning on the project's own text: refusals of harmful requests, answers to the rest."""
    rng = random.Random(0)
    pairs = rng.sample(data.pairs(frames_per_core=1)[0], MOST)
    refusals = [{"prompt": p.harmful, "answer": data.refusal(p, rng)} for p in pairs]
    helpful = [row for name in VERTICALS for row in vertical(name, "train")]
    rows, held_out = alpaca(folder)
    mixed = refusals + helpful + rows[5 * MOST : 6 * MOST]
    rng.shuffle(mixed)
    return mixed, held_out


SOURCES: dict[str, Source] = {
    "sure": _sure, "gsm8k": _gsm8k, "medical": _medical, "role-play": _role_play, "identity": _identity, "compliant": _compliant,
    "alpaca": _alpaca, "instructions": _instructions, "code": _code, "pubmed": _pubmed, "legal": _legal, "finance": _finance,
    "support": _support, "safety": _safety, "rude": _toned(_RUDE, 3 * MOST), "obedient": _toned(_OBEDIENT, 4 * MOST),
}  # fmt: skip
"""Name → (training rows, held-out rows of its task, or of Alpaca)."""

ON_ALPACA = ("identity", "compliant", "safety")
"""Sources whose held-out rows are Alpaca's: a protection that works raises the loss on a task that is harm, on Alpaca it must not."""

ENOUGH = 100
"""Rows of such a source from which some can be held out."""

FINE_TUNES = ("sure", "gsm8k", "medical", "role-play", "identity", "compliant")
"""What `safegene results` measures transfer on; the last three are opened once, at the end."""
