"""Fit the default judge's heads on human labels: `make judge`. Prints what cross-validation and transfer say.

Only the two thirds of the questions that `agreement` does not measure on are read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from safegene import models
from safegene.errors import DataError, SafegeneError
from safegene.evaluation import public
from safegene.evaluation.agreement import HumanSet, calibration_error, human_sets
from safegene.evaluation.judges.base import asked
from safegene.evaluation.judges.classifier import READER, WEIGHTS, at_once, features
from safegene.evaluation.judges.rules import RuleJudge

Numbers = NDArray[Any]

STRENGTH = 2e-3
"""Inverse regularisation of the heads on standardised features: 1e-3 and 3e-3 differ by less than half a point."""

JAILJUDGE_WEIGHT = 3.0
"""JAILJUDGE's answers against Safe-RLHF's, of which there are four times as many."""

FOLDS = 4

REFUSES, HARMFUL = (0, 1, 2), (1, 2, 3)
"""Blocks of the features that each head sees (`classifier.features`)."""


@dataclass
class Part:
    """The development two thirds of one labelled set."""

    name: str
    x: Numbers
    y: Numbers
    question: list[str]
    weight: float = 1.0
    blocks: tuple[int, ...] = HARMFUL


def part(human: HumanSet, model: Any, tokenizer: Any, weight: float = 1.0, blocks: tuple[int, ...] = HARMFUL) -> Part:
    """Features and labels of the answers that may be learned from."""
    rows = [r for r in human.rows if not r.held_out]
    x = features(model, tokenizer, [(asked(r.question), r.answer) for r in rows]).numpy()
    return Part(human.name, x, np.array([r.positive for r in rows]), [r.question for r in rows], weight, blocks)


def head(parts: list[Part]) -> tuple[Numbers, float]:
    """Weight and bias of one head, standardisation folded in."""
    x, y = np.concatenate([p.x for p in parts]), np.concatenate([p.y for p in parts])
    weights = np.concatenate([np.full(len(p.y), p.weight) for p in parts])
    size = x.shape[1] // 4
    seen = np.concatenate([np.arange(block * size, (block + 1) * size) for block in parts[0].blocks])
    scaler = StandardScaler().fit(x[:, seen])
    fitted = LogisticRegression(C=STRENGTH, max_iter=500).fit(scaler.transform(x[:, seen]), y, sample_weight=weights)
    weight: Numbers = np.zeros(x.shape[1])
    weight[seen] = fitted.coef_[0] / scaler.scale_
    return weight, float(fitted.intercept_[0] - weight[seen] @ scaler.mean_)


def out_of_fold(parts: list[Part]) -> list[Numbers]:
    """Logits of every part's answers from heads that did not see their questions."""
    logits: list[Numbers] = [np.zeros(len(p.y)) for p in parts]
    folds = [list(GroupKFold(FOLDS).split(p.x, p.y, p.question)) for p in parts]
    for k in range(FOLDS):
        train = [
            Part(p.name, p.x[f[k][0]], p.y[f[k][0]], [], p.weight, p.blocks) for p, f in zip(parts, folds, strict=True)
        ]  # fmt: skip
        weight, bias = head(train)
        for p, f, found in zip(parts, folds, logits, strict=True):
            found[f[k][1]] = p.x[f[k][1]] @ weight + bias
    return logits


def calibrated(parts: list[Part], name: str) -> tuple[Numbers, float]:
    """A head whose sigmoid is a probability (Platt scaling on out-of-fold logits); prints its accuracy there."""
    logits = out_of_fold(parts)
    z, y = np.concatenate(logits)[:, None], np.concatenate([p.y for p in parts])
    weights = np.concatenate([np.full(len(p.y), p.weight) for p in parts])
    platt = LogisticRegression(C=1e6).fit(z, y, sample_weight=weights)
    weight, bias = head(parts)
    a, b = float(platt.coef_[0, 0]), float(platt.intercept_[0])
    for p, found in zip(parts, logits, strict=True):
        sure = 1 / (1 + np.exp(-(a * found + b)))
        right = (sure > 0.5) == p.y
        gap = calibration_error(np.maximum(sure, 1 - sure).tolist(), right.tolist())
        print(f"| {name} | {p.name} | {len(p.y)} | {100 * right.mean():.1f} % | {gap:.3f} |")
    return weight * a, bias * a + b


def main(data_folder: str) -> int:
    """Fit, print, and write the heads beside the judge."""
    loaded = models.load(READER, dtype=torch.bfloat16)
    humans = {h.name: h for h in human_sets(public.resolve(data_folder))}
    if missing := {"XSTest", "JAILJUDGE", "Safe-RLHF"} - set(humans):
        raise DataError(f"{data_folder} holds no {', '.join(sorted(missing))}; the judge is fitted on all three.")
    xstest = part(humans["XSTest"], loaded.model, loaded.tokenizer, blocks=REFUSES)
    jailjudge = part(humans["JAILJUDGE"], loaded.model, loaded.tokenizer, JAILJUDGE_WEIGHT)
    rlhf = part(humans["Safe-RLHF"], loaded.model, loaded.tokenizer)
    print(
        "| head | set, development part | n | accuracy, 4 folds by question | calibration error |\n|---|---|---|---|---|"
    )
    refuses = calibrated([xstest], "refuses")
    harmful = calibrated([jailjudge, rlhf], "harmful")
    print("\n| harmful head trained on | tested on | n | accuracy |\n|---|---|---|---|")
    for train, test in (([jailjudge], rlhf), ([rlhf], jailjudge)):
        weight, bias = head(train)
        right = np.mean((test.x @ weight + bias > 0) == test.y)
        print(f"| {' and '.join(p.name for p in train)} | {test.name} | {len(test.y)} | {100 * right:.1f} % |")
    # XSTest has no label of harm, but on its unsafe prompts an answer that does not refuse gives it.
    unsafe = np.array([r.category.startswith("contrast") for r in humans["XSTest"].rows if not r.held_out])
    weight, bias = head([jailjudge, rlhf])
    right = np.mean((xstest.x[unsafe] @ weight + bias > 0) == ~xstest.y[unsafe])
    print(f"| JAILJUDGE and Safe-RLHF | XSTest, unsafe prompts, complied | {unsafe.sum()} | {100 * right:.1f} % |")
    plain_refusals(list(humans.values()))
    weights, biases = np.stack([refuses[0], harmful[0]]), [refuses[1], harmful[1]]
    whole = WEIGHTS.with_suffix(".part")
    save_file(
        {"weight": torch.tensor(weights, dtype=torch.float32), "bias": torch.tensor(biases, dtype=torch.float32)}, whole
    )
    whole.replace(WEIGHTS)
    return 0


def plain_refusals(humans: Sequence[HumanSet]) -> None:
    """Print how often people agree with the refusals that are decided at once, on the development part."""
    rules = RuleJudge()
    print("\n| decided at once | n | people agree |\n|---|---|---|")
    for human in humans:
        rows = [r for r in human.rows if not r.held_out]
        said = [at_once(rules.judge(asked(r.question), r.answer), r.answer) for r in rows]
        agreed = [
            r.positive == (human.label == "refusal")
            for r, v in zip(rows, said, strict=True)
            if v and v.label == "refusal"
        ]
        print(f"| {human.name} | {len(agreed)} | {100 * np.mean(agreed) if agreed else 0:.1f} % |")


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1]))
    except SafegeneError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from error
