"""Rates with intervals, paired tests, correction for many comparisons. The arithmetic is statsmodels' and scipy's."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import permutation_test, spearmanr
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

BOOTSTRAPS = 2000
NOISE = 0.05
"""Two runs whose corrected p is above this are not ranked."""


@dataclass(frozen=True)
class Rate:
    """A share with its 95 % interval: Wilson's, where the function that made it says nothing else."""

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


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> dict[str, float] | None:
    """Spearman's rank correlation of paired values, with a percentile interval of 2,000 bootstraps; None where there are fewer
    than four pairs or one side does not vary."""
    if len(x) < 4 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    rng = np.random.default_rng(0)
    a, b = np.asarray(x), np.asarray(y)
    drawn: list[float] = []
    while len(drawn) < BOOTSTRAPS:
        chosen = rng.integers(0, len(a), len(a))
        if len(set(a[chosen])) > 1 and len(set(b[chosen])) > 1:  # a draw of one value has no ranks
            drawn.append(float(spearmanr(a[chosen], b[chosen]).statistic))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"value": float(spearmanr(a, b).statistic), "low": float(low), "high": float(high), "n": len(a)}


def retention(before: Sequence[bool], after: Sequence[bool], seed: int = 0) -> Rate:
    """Share of successes after ÷ share before, on the same prompts; percentile interval of 2,000 paired bootstraps.

    Raises:
        ValueError: no success before, so nothing to retain.
    """
    n, rng = len(before), random.Random(seed)
    if not any(before):
        raise ValueError("Nothing succeeded before, so retention is not defined.")
    ratios = []
    for _ in range(BOOTSTRAPS):
        drawn = rng.choices(range(n), k=n)
        ratios.append(sum(after[i] for i in drawn) / max(1, sum(before[i] for i in drawn)))
    ratios.sort()
    return Rate(sum(after) / sum(before), n, ratios[49], ratios[1949])


def clustered_rate(outcomes: Sequence[bool], clusters: Sequence[str], seed: int = 0) -> Rate:
    """Share of True among outcomes that are not independent (one request in many wrappers): percentile interval of 2,000
    bootstraps of whole clusters. `n` counts outcomes.

    Raises:
        ValueError: no outcomes.
    """
    plain = rate(outcomes)
    groups: dict[str, list[bool]] = {}
    for outcome, cluster in zip(outcomes, clusters, strict=True):
        groups.setdefault(cluster, []).append(outcome)
    hits = np.asarray([sum(g) for g in groups.values()], float)
    sizes = np.asarray([len(g) for g in groups.values()], float)
    drawn = np.random.default_rng(seed).integers(0, len(hits), (BOOTSTRAPS, len(hits)))
    low, high = np.percentile(hits[drawn].sum(1) / sizes[drawn].sum(1), [2.5, 97.5])
    return Rate(plain.value, plain.n, min(float(low), plain.low), max(float(high), plain.high))


def macro_average(rates: Sequence[Rate]) -> Rate:
    """Mean of the groups' shares, every group weighing the same; its interval is put together from the groups' own
    (method of variance estimates recovery; Zou and Donner 2008), so that it has a width even where no group has
    a miss, and always holds the mean.

    Raises:
        ValueError: no groups.
    """
    if not rates:
        raise ValueError("A macro average needs at least one group.")
    k = len(rates)
    value = sum(r.value for r in rates) / k
    below = math.sqrt(sum((r.value - r.low) ** 2 for r in rates)) / k
    above = math.sqrt(sum((r.high - r.value) ** 2 for r in rates)) / k
    return Rate(value, sum(r.n for r in rates), max(0.0, value - below), min(1.0, value + above))


@dataclass(frozen=True)
class Difference:
    """Two runs on the same prompts: shares, their difference with a paired 95 % interval, exact McNemar p, and p
    after Holm's correction over all comparisons made together."""

    name: str
    before: float
    after: float
    value: float
    low: float
    high: float
    n: int
    p: float
    corrected: float

    @property
    def ranked(self) -> bool:
        """Whether the difference is more than noise; where not, neither run is called better."""
        return self.corrected <= NOISE


def compare(pairs: Mapping[str, tuple[Sequence[bool], Sequence[bool]]], seed: int = 0) -> list[Difference]:
    """Compare runs on the same prompts, a name for each comparison, all corrected together (Holm).

    Raises:
        ValueError: nothing to compare, or outcomes of different prompts.
    """
    if not pairs or not all(before and len(before) == len(after) for before, after in pairs.values()):
        raise ValueError("A comparison needs the outcomes of the same prompts, at least one.")
    ps = [paired_p(before, after) for before, after in pairs.values()]
    corrected = multipletests(ps, method="holm")[1]
    rng = np.random.default_rng(seed)
    found = []
    for (name, (before, after)), p, c in zip(pairs.items(), ps, corrected, strict=True):
        n, won = len(before), sum(y and not x for x, y in zip(before, after, strict=True))
        lost = sum(x and not y for x, y in zip(before, after, strict=True))
        # A Bayesian bootstrap over won, lost and equal pairs; without a won or lost pair the plain one has no width.
        drawn = rng.dirichlet([won + 0.5, lost + 0.5, n - won - lost + 0.5], BOOTSTRAPS)
        low, high = np.percentile(drawn[:, 0] - drawn[:, 1], [2.5, 97.5])
        a, b = float(np.mean(before)), float(np.mean(after))
        low, high = min(float(low), b - a), max(float(high), b - a)  # the half counts pull it inwards
        found.append(Difference(name, a, b, b - a, low, high, n, p, float(c)))
    return found


def corrected_together(differences: Sequence[Difference]) -> list[Difference]:
    """Comparisons of several kinds, their p corrected over all of them (Holm)."""
    corrected = multipletests([d.p for d in differences], method="holm")[1]
    return [replace(d, corrected=float(c)) for d, c in zip(differences, corrected, strict=True)]


def compare_clustered(pairs: Mapping[str, Sequence[tuple[float, float]]], seed: int = 0) -> list[Difference]:
    """Compare runs whose outcomes hang together, such as one prompt put to many fine-tunes: every pair is a cluster's mean
    before and after. p by random flips of the clusters' signs, the interval by 2,000 bootstraps of whole clusters, all
    corrected together (Holm). `n` counts clusters.

    Raises:
        ValueError: nothing to compare.
    """
    if not pairs or not all(pairs.values()):
        raise ValueError("A comparison needs at least one prompt that was put to both.")
    ps, found = [], []
    rng = np.random.default_rng(seed)
    for clusters in pairs.values():
        before, after = np.asarray(clusters, float).T
        gaps = after - before
        if gaps.any():
            test = permutation_test(
                (gaps,),
                np.mean,
                permutation_type="samples",
                n_resamples=5000,
                vectorized=True,
                rng=np.random.default_rng(seed),
            )
            ps.append(float(test.pvalue))
        else:
            ps.append(1.0)
        drawn = gaps[rng.integers(0, len(gaps), (BOOTSTRAPS, len(gaps)))].mean(1)
        low, high = np.percentile(drawn, [2.5, 97.5])
        found.append((float(before.mean()), float(after.mean()), float(low), float(high), len(gaps)))
    corrected = multipletests(ps, method="holm")[1]
    return [
        Difference(name, a, b, b - a, low, high, n, p, float(c))
        for name, (a, b, low, high, n), p, c in zip(pairs, found, ps, corrected, strict=True)
    ]
