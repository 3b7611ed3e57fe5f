"""How fast the judge judges and how much batching gains: `make speed`. Both are measured in this process, nothing beside it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch

from safegene import models
from safegene.errors import SafegeneError
from safegene.evaluation import public, public_suites
from safegene.evaluation.agreement import human_sets
from safegene.evaluation.judges import Message, asked, default_judge
from safegene.evaluation.judges.classifier import at_once
from safegene.evaluation.judges.rules import RuleJudge
from safegene.evaluation.runner import BATCH

TOKENS = 48
MODEL = "SmolLM2-135M-Instruct"


def judging(data_folder: str) -> None:
    """Answers a second of the default judge, over all labelled answers and over those that the rules decide at once."""
    items: list[tuple[Sequence[Message], str]] = [
        (asked(r.question), r.answer) for human in human_sets(public.resolve(data_folder)) for r in human.rows
    ]
    rules, judge = RuleJudge(), default_judge()
    cheap = [item for item in items if at_once(rules.judge(*item), item[1])]
    judge.judge(asked("Hello"), "Hello, how are you today?")  # loads the reader
    for name, some in (("all labelled answers", items), ("decided at once", cheap)):
        start = time.perf_counter()
        n = sum(1 for _ in judge.judge_many(some))
        seconds = time.perf_counter() - start
        print(f"| judging: {name} | {n} | {seconds:.1f} s | {n / seconds:.0f} a second |", flush=True)


def generating(data_folder: str) -> None:
    """XSTest's prompts answered in batches by length, and one at a time."""
    prompts = [s.turns[0] for s in public_suites.load("xstest", data_folder)]
    loaded = models.load(MODEL, dtype=torch.bfloat16)
    seconds = {}
    for name, batch in (("batches", BATCH), ("one at a time", 1)):
        start = time.perf_counter()
        models.generate(loaded.model, loaded.tokenizer, prompts, TOKENS, batch=batch)
        seconds[name] = time.perf_counter() - start
        rate = len(prompts) / seconds[name]
        print(f"| generating: {name} | {len(prompts)} | {seconds[name]:.1f} s | {rate:.1f} a second |", flush=True)
    print(
        f"\nBatches are {seconds['one at a time'] / seconds['batches']:.1f} times as fast, {TOKENS} tokens an answer."
    )


def main(data_folder: str) -> int:
    print("| what | n | time | speed |\n|---|---|---|---|")
    try:
        judging(data_folder)
        generating(data_folder)
    except SafegeneError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
