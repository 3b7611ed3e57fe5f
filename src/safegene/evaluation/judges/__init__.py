"""Judges: is an answer a refusal, a safe completion, harmful compliance, or incoherent?"""

from __future__ import annotations

from safegene.evaluation.judges.base import Judge, Label, Message, Verdict, asked
from safegene.evaluation.judges.rules import RuleJudge

__all__ = ["Judge", "Label", "Message", "RuleJudge", "Verdict", "asked", "default_judge"]


def default_judge() -> Judge:
    """The judge that every command uses unless told otherwise: offline, deterministic."""
    return RuleJudge()
