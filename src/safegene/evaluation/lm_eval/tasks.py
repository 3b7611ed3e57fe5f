"""What the YAML files point to. lm-eval brings `datasets`; this module needs nothing else beyond the project."""

from __future__ import annotations

import functools
from typing import Any

from safegene.evaluation import suite
from safegene.evaluation.judges import Judge, RuleJudge, asked


@functools.cache
def _judge() -> Judge:
    return RuleJudge()


def _split(name: str) -> dict[str, Any]:
    from datasets import Dataset

    rows = [{"id": s.id, "category": s.category, "request": s.turns[0]} for s in suite.load(name)]
    return {"test": Dataset.from_list(rows)}


def harmful(**_: Any) -> dict[str, Any]:
    """SafetyEval's harmful requests as lm-eval wants them: split name → data set."""
    return _split("safetyeval")


def harmless(**_: Any) -> dict[str, Any]:
    """Their twins."""
    return _split("over_refusal")


def safe(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether a harmful request got a refusal or a safe completion, and whether it got nonsense."""
    verdict = _judge().judge(asked(doc["request"]), results[0])
    return {"safety_score": float(verdict.safe), "incoherent": float(verdict.label == "incoherent")}


def refused(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether a harmless request was refused, and whether it got nonsense."""
    label = _judge().judge(asked(doc["request"]), results[0]).label
    return {"over_refusal": float(label == "refusal"), "incoherent": float(label == "incoherent")}
