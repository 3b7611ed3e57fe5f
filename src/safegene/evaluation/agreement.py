"""How far a judge agrees with people, on three sets with human labels: XSTest, JAILJUDGE and Safe-RLHF.

The default judge is trained on two thirds of their questions; the other third, drawn by a hash of the question, is what this
module measures on, for every judge, so that all are compared on the same answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sklearn.metrics import cohen_kappa_score, f1_score

from safegene.errors import DataError
from safegene.evaluation.judges import Judge, Label, Message, Verdict, asked
from safegene.evaluation.public_suites import read_file
from safegene.evaluation.statistics import Rate, rate
from safegene.progress import Progress, silent

TEST_SHARE = 1 / 3
_SALT = "safegene-judge-test"


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
        DataError: none is there, or a column is missing.
    """
    found = []
    try:
        rows = [
            Labelled(r["prompt"], r["completion"].strip(), not r["final_label"].startswith("1"), r["type"])
            for path in sorted(folder.glob("**/xstest_v2_completions_*.csv"))
            for r in read_file(path)
        ]
        found.append(HumanSet("XSTest", "refused, in full or in part", "refusal", rows))
        for name, file in (("JAILJUDGE", "JAILJUDGEmini.csv"), ("Safe-RLHF", "Safe-RLHFmini.csv")):
            rows = [
                Labelled(r["question"], r["answer"], r["label"] == "1", r.get("hazard_cate_llamaguard3") or "")
                for path in sorted(folder.glob(f"**/{file}"))
                for r in read_file(path)
            ]
            found.append(HumanSet(name, "harmful", "harmful compliance", rows))
    except KeyError as error:
        raise DataError(f"{folder}: a labelled set lacks the column {error}; fetch it again.") from error
    if not any(s.rows for s in found):
        raise DataError(f"{folder} holds no labelled answers; give the folder of the public data sets.")
    return [s for s in found if s.rows]


@dataclass(frozen=True)
class Agreement:
    """One judge against one set's held-out human labels."""

    set: str
    meaning: str
    accuracy: Rate
    kappa: float
    f1: float
    missed: int
    """People say yes, the judge no."""
    invented: int
    """The judge says yes, people no."""
    calibration_error: float
    """How far the confidence of its verdicts is from how often they are right here: mean over ten bins, by their size. A
    verdict's confidence is about its own label; a set asks about one label only."""
    by_category: dict[str, Rate]


def agreement(human: HumanSet, verdicts: Sequence[Verdict], rows: Sequence[Labelled]) -> Agreement:
    """Compare verdicts with the labels of the same rows."""
    said = [v.label == human.label for v in verdicts]
    truth = [r.positive for r in rows]
    right = [a is b for a, b in zip(said, truth, strict=True)]
    groups: dict[str, list[bool]] = {}
    for r, ok in zip(rows, right, strict=True):
        groups.setdefault(r.category, []).append(ok)
    return Agreement(
        human.name, human.meaning, rate(right), float(cohen_kappa_score(truth, said)), float(f1_score(truth, said)),
        missed=sum(t and not s for t, s in zip(truth, said, strict=True)),
        invented=sum(s and not t for t, s in zip(truth, said, strict=True)),
        calibration_error=calibration_error([v.confidence for v in verdicts], right),
        by_category={k: rate(v) for k, v in groups.items() if k},
    )  # fmt: skip


def calibration_error(confidences: Sequence[float], right: Sequence[bool], bins: int = 10) -> float:
    """Expected calibration error, in [0, 1] (Naeini et al. 2015): bins of equal width between ½ and 1."""
    groups: dict[int, list[tuple[float, bool]]] = {}
    for confidence, ok in zip(confidences, right, strict=True):
        place = int(round((confidence - 0.5) * 2 * bins, 9))
        groups.setdefault(max(0, min(place, bins - 1)), []).append((confidence, ok))
    gaps = (abs(sum(c for c, _ in g) - sum(ok for _, ok in g)) for g in groups.values())
    return sum(gaps) / len(right)


def measure(judge: Judge, folder: Path, progress: Progress = silent) -> list[Agreement]:
    """Agreement of `judge` with people on the held-out third of every labelled set in `folder`."""
    found = []
    for human in human_sets(folder):
        rows = [r for r in human.rows if r.held_out]
        if not rows:
            raise DataError(f"{folder}: no question of {human.name} falls into the held-out third; give the whole set.")
        advance = progress(f"judging {human.name}", len(rows))
        items: list[tuple[Sequence[Message], str]] = [(asked(r.question), r.answer) for r in rows]
        verdicts = []
        for verdict in judge.judge_many(items):
            verdicts.append(verdict)
            advance(1)
        found.append(agreement(human, verdicts, rows))
    return found
