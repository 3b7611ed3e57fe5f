"""A team's own training text, beside the project's: what their users ask, and what must be refused there."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from safegene.errors import DataError
from safegene.training import data
from safegene.training.data import Pair


class OwnText(NamedTuple):
    """Pairs to train on, pairs that are kept out, everyday requests."""

    pairs: list[Pair]
    held_out: list[Pair]
    ordinary: list[str]

    @property
    def rows(self) -> int:
        return len(self.pairs) + len(self.held_out) + len(self.ordinary)


def own_text(pairs_file: str, ordinary_file: str, held_out: float) -> OwnText:
    """Read a recipe's `pairs_file` (JSONL: `category`, `harmful`, `twin`) and `ordinary_file` (JSONL: `text`); "" is none.

    The category says which refusals are drawn for a pair; see `data.refusals`. Nothing is put into frames: what is written is
    what is asked.

    Args:
        held_out: share of the pairs that is kept out of training.

    Raises:
        DataError: not readable, a category without refusals, or a twin that is the harmful request itself.
    """
    found = OwnText([], [], [])
    known = data.refusals()
    for number, row in enumerate(
        data.read_jsonl(Path(pairs_file), ("category", "harmful", "twin")) if pairs_file else (), 1
    ):
        harmful, twin = row["harmful"].strip(), row["twin"].strip()
        if row["category"] not in known:
            raise DataError(
                f"{pairs_file}, row {number}: no category '{row['category']}'; use {', '.join(sorted(known))}."
            )
        if harmful == twin:
            raise DataError(
                f"{pairs_file}, row {number}: the twin is the harmful request; write a harmless one like it."
            )
        kept_out = data.is_held_out(harmful, held_out)
        (found.held_out if kept_out else found.pairs).append(Pair(row["category"], "own", harmful, twin, harmful))
    if ordinary_file:
        found.ordinary.extend(row["text"].strip() for row in data.read_jsonl(Path(ordinary_file), ("text",)))
    return found
