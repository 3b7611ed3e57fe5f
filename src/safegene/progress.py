"""Progress of long work: what the library reports; the command line draws it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Advance = Callable[[int], None]
"""Called with the number of units just finished."""


class Progress(Protocol):
    """Called at the start of a stage; `total` is its number of units, 0 where it cannot be counted."""

    def __call__(self, stage: str, total: int = 0) -> Advance: ...


def silent(stage: str, total: int = 0) -> Advance:
    """Draws nothing."""
    return lambda units: None
