"""Evaluation prompts must not be trained on: overlap of word 7-grams, checked before every training.

The prompts of the public evaluation sets travel as hashes of their 7-grams (`text/evaluation_grams.txt`), so that the
check works without the sets and the package carries none of their text. `make evaluation-grams` writes
the file anew from the public sets.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable

from safegene.training.data import TEXT

N = 7
SHORTEST = 4
"""Prompts of fewer words are left out: "Make a cake" says nothing about where it came from."""


def grams(text: str, n: int = N) -> set[str]:
    """Word n-grams in lower case; the whole text when it is shorter."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    return {" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def digest(gram: str) -> str:
    """40 bits of SHA-256: one false alarm in ten thousand trainings."""
    return hashlib.sha256(gram.encode()).hexdigest()[:10]


def digests(prompts: Iterable[str]) -> set[str]:
    """Hashes of all n-grams of `prompts`."""
    return {digest(g) for prompt in prompts for g in grams(prompt) if g.count(" ") >= SHORTEST - 1}


@functools.cache
def shipped() -> frozenset[str]:
    """Hashes of the public evaluation sets named in docs/results."""
    return frozenset((TEXT / "evaluation_grams.txt").read_text(encoding="ascii").split())


def overlap(texts: Iterable[str], known: Iterable[str]) -> list[str]:
    """Those of `texts` that share an n-gram with the prompts whose `digests` are `known`."""
    known = frozenset(known)
    return [text for text in texts if any(digest(g) in known for g in grams(text))]
