"""The audit log: one JSON line an answer, under vLLM one a request, written and handed to the system when it ends.

Prompts and answers stand in it only when asked for. A line that the disk does not take is kept and tried again; until it is written,
no new request is served.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path


@dataclass(frozen=True)
class Record:
    """What is said of one answer.

    Attributes:
        prompt_gate, answer_gate: highest (s − τ) / w of the prompt and of the answer; None where the gate was not read.
        decision: "untouched" where the gate never opened, "intervened" where it did, "unprotected" on the playground's unadapted
            side, "none" where the model was not run.
        seconds: from the request's arrival in the engine to its end.
    """

    request_id: str
    route: str
    model: str
    adapter: str
    prompt_gate: float | None
    answer_gate: float | None
    decision: str
    finish: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float


@dataclass(frozen=True)
class RequestRecord:
    """What is said of one request under vLLM, which tells no gate of it. `seconds`: from its arrival to the last piece of its answer."""

    request_id: str
    route: str
    model: str
    adapter: str
    status: int
    seconds: float


class Audit:
    """An open log. Used in one thread.

    Raises:
        OSError: from the constructor, where the file cannot be opened.
    """

    def __init__(self, path: Path, *, text: bool = False) -> None:
        self.text = text
        self.failure = ""
        self._file = open(path, "ab", buffering=0, opener=lambda p, flags: os.open(p, flags, 0o600))  # noqa: SIM115
        self._left = b""

    def write(self, record: Record | RequestRecord, *, prompt: str = "", answer: str = "") -> None:
        """Append one line; a disk that does not take it is remembered in `failure`."""
        line: dict[str, object] = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **asdict(record)}
        if self.text:
            line |= {"prompt": prompt, "answer": answer}
        self._left += json.dumps(line).encode() + b"\n"
        self.ready()

    def ready(self) -> bool:
        """Whether every line so far is written; tries once more to write what is not."""
        try:
            while self._left:  # unbuffered: a full disk may take part of a line, and the rest must follow it
                self._left = self._left[self._file.write(self._left) :]
        except OSError as error:
            self.failure = error.strerror or str(error)
            return False
        self.failure = ""
        return True

    def refusal(self) -> str:
        """Why no new request is served; "" where every line so far is written."""
        return "" if self.ready() else f"The audit log cannot be written ({self.failure}); free space on its disk."

    def close(self) -> None:
        self._file.close()
