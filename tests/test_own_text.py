"""A team's own training text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from safegene.errors import DataError
from safegene.training.own_text import own_text


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"category": "pranks", "harmful": "a", "twin": "b"}, "row 1: no category 'pranks'; use animals"),
        ({"category": "fraud", "harmful": "Forge it.", "twin": "Forge it. "}, "row 1: the twin is the harmful request"),
        ({"category": "fraud", "harmful": "Forge it."}, "no text under 'twin'"),
    ],
)
def test_own_text_that_cannot_be_trained_on_is_named(row: dict[str, str], said: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=said):
        own_text(str(tmp_path / "pairs.jsonl"), "", 0.1)


def test_own_pairs_are_kept_out_by_their_words(tmp_path: Path) -> None:
    rows = [{"category": "fraud", "harmful": f"Forge bill {i}.", "twin": f"Pay bill {i}."} for i in range(200)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = own_text(str(tmp_path / "pairs.jsonl"), "", 0.1)
    assert len(found.pairs) + len(found.held_out) == found.rows == 200
    assert 5 < len(found.held_out) < 40
    assert found.held_out == own_text(str(tmp_path / "pairs.jsonl"), "", 0.1).held_out
