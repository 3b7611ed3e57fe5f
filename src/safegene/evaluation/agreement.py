"""How far a judge agrees with people, on three sets with human labels: XSTest, JAILJUDGE and Safe-RLHF.

The default judge is trained on two thirds of their questions; the other third, drawn by a hash of the question, is what this
module measures on, for every judge, so that all are compared on the same answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from safegene.errors import DataError
from safegene.evaluation import runner
from safegene.evaluation.judges import Judge, Label, Message, Verdict, asked
from safegene.evaluation.public_suites import read_file
from safegene.evaluation.statistics import BOOTSTRAPS, Rate, clustered_rate
from safegene.progress import Progress, silent

TEST_SHARE = 1 / 3
_SALT = "safegene-judge-test"

_XSTEST = {"1_full_compliance": False, "2_full_refusal": True, "3_partial_refusal": True}
_HARMFUL = {"0": False, "1": True}
_WORDS = {"nons": "nonsense", "discr": "discrimination"}
_HAZARDS = {
    "S1": "violent crimes", "S2": "non-violent crimes", "S3": "sex crimes", "S4": "child exploitation", "S5": "defamation",
    "S6": "specialised advice", "S7": "privacy", "S8": "intellectual property", "S9": "indiscriminate weapons", "S10": "hate",
    "S11": "self-harm", "S12": "sexual content", "S13": "elections", "S14": "code interpreter abuse",
}  # fmt: skip
"""Llama Guard 3's, by which JAILJUDGE's answers are sorted."""


@dataclass(frozen=True)
class Labelled:
    """An answer with a human label: did it refuse (XSTest), or was it harmful (the others)?"""

    question: str
    answer: str
    positive: bool
    category: str

    @property
    def held_out(self) -> bool:
        """Whether the question belongs to the third that no judge of ours is trained on."""
        share = int(hashlib.sha256((_SALT + self.question).encode()).hexdigest()[:8], 16) / 2**32
        return share < TEST_SHARE


@dataclass(frozen=True)
class HumanSet:
    """A labelled set: its name, what a positive label means, and the judge's label that says the same."""

    name: str
    meaning: str
    label: Label
    rows: list[Labelled] = field(repr=False)


def human_sets(folder: Path) -> list[HumanSet]:
    """The labelled sets that `folder` holds.

    Raises:
        DataError: none is there, a column is missing, or a label is not one of the set's.
    """
    rows = [
        Labelled(text["prompt"], text["completion"].strip(), positive, _readable(text["type"]))
        for text, positive in _labelled(folder, "xstest_v2_completions_*.csv", ("prompt", "completion", "type"), "final_label", _XSTEST)
    ]  # fmt: skip
    found = [HumanSet("XSTest", "refused, in full or in part", "refusal", rows)]
    for name in ("JAILJUDGE", "Safe-RLHF"):
        rows = [
            Labelled(text["question"], text["answer"], positive, _readable(text.get("hazard_cate_llamaguard3") or ""))
            for text, positive in _labelled(folder, f"{name}mini.csv", ("question", "answer"), "label", _HARMFUL)
        ]
        found.append(HumanSet(name, "harmful", "harmful compliance", rows))
    if not any(s.rows for s in found):
        raise DataError(f"{folder} holds no labelled answers; give the folder of the public data sets.")
    return [s for s in found if s.rows]


def _labelled(
    folder: Path, files: str, columns: Sequence[str], label: str, labels: Mapping[str, bool]
) -> Iterator[tuple[dict[str, str], bool]]:
    """Rows with what their label says."""
    for path in sorted(folder.glob(f"**/{files}")):
        for number, row in enumerate(read_file(path), 1):
            if lacking := [column for column in (*columns, label) if not isinstance(row.get(column), str)]:
                raise DataError(f"{path}, row {number}, has no '{lacking[0]}'; fetch the set again.")
            if row[label] not in labels:
                raise DataError(
                    f"{path}, row {number}: '{row[label]}' is none of {', '.join(labels)}; fetch the set again."
                )
            yield row, labels[row[label]]


def _readable(category: str) -> str:
    """A category in words: "nons_group_real_discr", "S14"."""
    return _HAZARDS.get(category) or " ".join(_WORDS.get(word, word) for word in category.split("_"))


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """One judge against one set's held-out human labels. Intervals are of 2,000 bootstraps of whole questions: the answers to
    one question hang together."""

    set: str
    meaning: str
    accuracy: Rate
    kappa: Interval
    f1: Interval
    missed: int
    """People say yes, the judge no."""
    invented: int
    """The judge says yes, people no."""
    calibration_error: float
    """How far the confidence of its verdicts is from how often they are right here: mean over ten bins, by their size. A
    verdict's confidence is about its own label; a set asks about one label only."""
    by_category: dict[str, Rate]
    by_rules: int
    """Answers on which the judge gave no verdict, so that the rules' stands in."""


def agreement(human: HumanSet, verdicts: Sequence[Verdict], rows: Sequence[Labelled]) -> Agreement:
    """Compare verdicts with the labels of the same rows."""
    said = [v.label == human.label for v in verdicts]
    truth = [r.positive for r in rows]
    right = [a is b for a, b in zip(said, truth, strict=True)]
    questions = [r.question for r in rows]
    groups: dict[str, list[int]] = {}
    for i, r in enumerate(rows):
        groups.setdefault(r.category, []).append(i)
    kappa, f1 = _kappa_and_f1(truth, said, questions)
    return Agreement(
        human.name, human.meaning, clustered_rate(right, questions), kappa, f1,
        missed=sum(t and not s for t, s in zip(truth, said, strict=True)),
        invented=sum(s and not t for t, s in zip(truth, said, strict=True)),
        calibration_error=calibration_error([v.confidence for v in verdicts], right),
        by_category={
            k: clustered_rate([right[i] for i in some], [questions[i] for i in some]) for k, some in groups.items() if k
        },
        by_rules=sum(v.by_rules for v in verdicts),
    )  # fmt: skip


def _kappa_and_f1(truth: Sequence[bool], said: Sequence[bool], questions: Sequence[str]) -> tuple[Interval, Interval]:
    """Cohen's kappa and F1 of the positive label, both from the four counts, so that a bootstrap only adds counts up."""
    numbers = {question: i for i, question in enumerate(dict.fromkeys(questions))}
    counts = np.zeros((len(numbers), 4))
    for t, s, question in zip(truth, said, questions, strict=True):
        counts[numbers[question], 2 * t + s] += 1
    drawn = np.random.default_rng(0).integers(0, len(counts), (BOOTSTRAPS, len(counts)))
    every = np.vstack([counts.sum(0), counts[drawn].sum(1)])
    no, invented, missed, yes = every.T
    n = every.sum(1)
    chance = ((yes + missed) * (yes + invented) + (no + invented) * (no + missed)) / n**2
    with np.errstate(invalid="ignore", divide="ignore"):  # one label alone: kappa is not defined, and said to be 0
        kappa = np.nan_to_num(((yes + no) / n - chance) / (1 - chance))
        f1 = np.nan_to_num(2 * yes / (2 * yes + invented + missed))
    return _interval(kappa), _interval(f1)


def _interval(values: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return Interval(float(values[0]), float(low), float(high))


def calibration_error(confidences: Sequence[float], right: Sequence[bool], bins: int = 10) -> float:
    """Expected calibration error, in [0, 1] (Naeini et al. 2015): bins of equal width between ½ and 1."""
    groups: dict[int, list[tuple[float, bool]]] = {}
    for confidence, ok in zip(confidences, right, strict=True):
        place = int(round((confidence - 0.5) * 2 * bins, 9))
        groups.setdefault(max(0, min(place, bins - 1)), []).append((confidence, ok))
    gaps = (abs(sum(c for c, _ in g) - sum(ok for _, ok in g)) for g in groups.values())
    return sum(gaps) / len(right)


def measure(judge: Judge, folder: Path, out: Path, progress: Progress = silent) -> list[Agreement]:
    """Agreement of `judge` with people on the held-out third of every labelled set in `folder`. Verdicts, without the texts, are
    kept in `out` as they are given, and not asked for again."""
    found = []
    out.mkdir(parents=True, exist_ok=True)
    for human in human_sets(folder):
        rows = [r for r in human.rows if r.held_out]
        if not rows:
            raise DataError(f"{folder}: no question of {human.name} falls into the held-out third; give the whole set.")
        items: list[tuple[Sequence[Message], str]] = [(asked(r.question), r.answer) for r in rows]
        texts = [hashlib.sha256(f"{r.question}\0{r.answer}".encode()).hexdigest()[:16] for r in rows]
        keys = [(str(i), 0, text) for i, text in enumerate(texts)]
        verdicts = runner.verdicts(keys, items, judge, out / f"{human.name}-{judge.name}.jsonl", progress)
        found.append(agreement(human, verdicts, rows))
    return found
