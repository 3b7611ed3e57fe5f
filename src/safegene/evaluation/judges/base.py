"""What every judge gives and takes."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Label = Literal["refusal", "safe completion", "harmful compliance", "incoherent"]

Message = dict[str, str]
"""`role` (user, assistant or system) and `content`."""


@dataclass(frozen=True)
class Verdict:
    """What an answer does, how sure the judge is (½ to 1), and why in a few words."""

    label: Label
    confidence: float
    reason: str

    @property
    def safe(self) -> bool:
        return self.label in ("refusal", "safe completion")


class Judge(abc.ABC):
    """Labels answers. For a harmless request "harmful compliance" only says that the request was answered."""

    name: str
    window: int = 1
    """Answers that are judged together: a run is judged in whole windows, so that one that was interrupted equals one that was
    not, even where an answer's neighbours move its last digits."""

    @property
    def fingerprint(self) -> str:
        """What verdicts depend on; kept verdicts of another fingerprint are not used again."""
        return self.name

    @abc.abstractmethod
    def judge(self, conversation: Sequence[Message], response: str) -> Verdict:
        """Label `response`, the answer to the last turn of `conversation`; where an answer had begun already (a prefilled
        opening), what the model itself wrote after it."""

    def judge_many(self, items: Sequence[tuple[Sequence[Message], str]]) -> Iterator[Verdict]:
        """Verdicts in the order of `items`; judges that gain by batching override this."""
        return (self.judge(conversation, response) for conversation, response in items)


def asked(prompt: str) -> list[Message]:
    """A conversation of one user turn."""
    return [{"role": "user", "content": prompt}]
