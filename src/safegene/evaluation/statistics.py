"""Rates with intervals, and paired tests. The arithmetic is statsmodels'."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint


@dataclass(frozen=True)
class Rate:
    """A share with its 95 % Wilson interval."""

    value: float
    n: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}], n = {self.n}"


def rate(outcomes: Sequence[bool]) -> Rate:
    """Share of True.

    Raises:
        ValueError: no outcomes.
    """
    n = len(outcomes)
    if n == 0:
        raise ValueError("A rate needs at least one outcome; the data set is empty.")
    hits = sum(outcomes)
    low, high = proportion_confint(hits, n, method="wilson")
    return Rate(hits / n, n, float(low), float(high))


def paired_p(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Exact McNemar test of two outcomes on the same prompts: p that they differ by chance."""
    both = [[0, 0], [0, 0]]
    for a, b in zip(before, after, strict=True):
        both[a][b] += 1
    return float(mcnemar(both, exact=True).pvalue)


def retention(before: Sequence[bool], after: Sequence[bool], seed: int = 0) -> Rate:
    """Share of successes after ÷ share before, on the same prompts; percentile interval of 2,000 paired bootstraps.

    Raises:
        ValueError: no success before, so nothing to retain.
    """
    n, rng = len(before), random.Random(seed)
    if not any(before):
        raise ValueError("Nothing succeeded before, so retention is not defined.")
    ratios = []
    for _ in range(2000):
        drawn = rng.choices(range(n), k=n)
        ratios.append(sum(after[i] for i in drawn) / max(1, sum(before[i] for i in drawn)))
    ratios.sort()
    return Rate(sum(after) / sum(before), n, ratios[49], ratios[1949])
