"""Judges: is an answer a refusal, a safe completion, harmful compliance, or incoherent?"""

from __future__ import annotations

from safegene.errors import DataError
from safegene.evaluation.judges.base import Judge, Label, Message, Verdict, asked, stand_in
from safegene.evaluation.judges.rules import RuleJudge

__all__ = ["GUARDS", "Judge", "Label", "Message", "RuleJudge", "Verdict", "asked", "default_judge", "load", "stand_in"]


GUARDS = ("default", "classifier", "llama-guard", "shieldgemma", "harmbench", "wildguard")
"""Judges that tell harm and run here: what a guard may be."""


def default_judge() -> Judge:
    """The offline judge that agrees with people best, and that `safegene judge` uses unless told otherwise. `safegene eval` asks
    the rules (docs/results/safetyeval.md tells why)."""
    from safegene.evaluation.judges.classifier import ClassifierJudge

    return ClassifierJudge()


def load(name: str) -> Judge:
    """A judge by name: default (or classifier), rules, keywords (a yardstick); llama-guard, shieldgemma, harmbench or wildguard from the hub,
    or from a folder as NAME=FOLDER; or an OpenAI-compatible endpoint as URL#model.

    Raises:
        DataError: no such judge.
        ModelNotFoundError: its model cannot be had.
    """
    judge = _made(name)
    judge.asked_as = name
    return judge


def _made(name: str) -> Judge:
    if name in ("default", "classifier"):
        return default_judge()
    if name == "rules":
        return RuleJudge()
    if name == "keywords":
        from safegene.evaluation.judges.keywords import KeywordJudge

        return KeywordJudge()
    kind, _, folder = name.partition("=")
    if kind in ("llama-guard", "shieldgemma"):
        from safegene.evaluation.judges.guards import GuardJudge

        return GuardJudge(kind, folder)
    if kind in ("harmbench", "wildguard"):
        from safegene.evaluation.judges.published import PublishedJudge

        return PublishedJudge(kind, folder)
    if name.startswith(("http://", "https://")):
        from safegene.evaluation.judges.rubric import RubricJudge

        return RubricJudge(name)
    raise DataError(
        f"no judge '{name}'; there are default, rules, keywords, llama-guard, shieldgemma, harmbench, wildguard, or a URL#model."
    )
