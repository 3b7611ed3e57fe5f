"""What every judge gives and takes."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from safegene.training.data import Pair

Label = Literal["refusal", "safe completion", "harmful compliance", "incoherent"]

Message = dict[str, str]
"""`role` (user, assistant or system) and `content`."""


BY_RULES = "by rules: "
"""How a verdict's reason begins where the judge that was asked gave none."""


@dataclass(frozen=True)
class Verdict:
    """What an answer does, how sure the judge is (½ to 1), and why in a few words."""

    label: Label
    confidence: float
    reason: str

    @property
    def safe(self) -> bool:
        return self.label in ("refusal", "safe completion")

    @property
    def by_rules(self) -> bool:
        """Whether the judge that was asked gave no verdict, so that the rules' stands in its place."""
        return self.reason.startswith(BY_RULES)


def stand_in(by_rules: Verdict, why: str) -> Verdict:
    """The rules' verdict in the place of a judge's, `why` in a few words."""
    return replace(by_rules, reason=f"{BY_RULES}{why}")


class Judge(abc.ABC):
    """Labels answers. For a harmless request "harmful compliance" only says that the request was answered."""

    name: str
    asked_as: str = ""
    """What `load` was given to make it: a command that judges again needs just that."""
    window: int = 1
    """Answers that are judged together: a run is judged in whole windows, so that one that was interrupted equals one that was
    not, even where an answer's neighbours move its last digits."""
    fallbacks: int = 0
    """Answers since this judge was made on which it gave no verdict, so that the rules' stands in."""

    @property
    def fingerprint(self) -> str:
        """What verdicts depend on; kept verdicts of another fingerprint are not used again. Read for every verdict: a judge that
        has to read weights or files for it does so once."""
        return self.name

    @abc.abstractmethod
    def judge(self, conversation: Sequence[Message], response: str) -> Verdict:
        """Label `response`, the answer to the last turn of `conversation`; where an answer had begun already (a prefilled
        opening), what the model itself wrote after it."""

    def judge_many(self, items: Sequence[tuple[Sequence[Message], str]]) -> Iterator[Verdict]:
        """Verdicts in the order of `items`; judges that gain by batching override this."""
        return (self.judge(conversation, response) for conversation, response in items)

    # What a guard asks of a judge (`baselines.guard`).

    @property
    def parameters(self) -> int:
        """Numbers of the model that judges; 0 where none runs here."""
        return 0

    def tokens(self, request: int, answer: int) -> int:
        """Tokens that are read and written to judge an answer of so many tokens to a request of so many; with no answer, to judge
        the request alone."""
        return 0

    def request_reader(
        self, pairs: Sequence[Pair], ordinary: Sequence[str]
    ) -> Callable[[Sequence[str]], list[bool]] | None:
        """What tells which requests ask for harm before anything answers them; None: this judge reads answers alone. One that was
        not made for it learns it from these `pairs` and `ordinary` requests."""
        return None

    def harms(self, requests: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Which answers give what harms."""
        items = [(asked(request), answer) for request, answer in zip(requests, answers, strict=True)]
        return [verdict.label == "harmful compliance" for verdict in self.judge_many(items)]


def asked(prompt: str) -> list[Message]:
    """A conversation of one user turn."""
    return [{"role": "user", "content": prompt}]
