"""When an answer is no language: empty, stuck in a loop, hammered on a keyboard, words without grammar.

Cheap signs only, each far from what a list, a program or a poem with a refrain shows. Fluent nonsense, sentences that have
grammar and no sense, they do not see.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter

_SPECIAL = re.compile(
    r"<\|[^|<>]*\|>|</?s>|<(?:pad|unk|bos|eos|mask|start_of_turn|end_of_turn)>|\[/?inst\]|\[(?:pad|unk|cls|sep)\]",
    re.IGNORECASE,
)
_ROLE = re.compile(r"\b(?:assistant|user|system|model)\b", re.IGNORECASE)
_FENCE = re.compile(r"```[\w+-]*")
_RULED = re.compile(r"([^\w\s]|_)\1{3,}")
"""A rule of a table, a blank to be filled in: one sign, however long."""
_LINK = re.compile(r"https?://\S+")

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_WALKS = "|".join(row[i : i + 5] for r in _ROWS for row in (r, r[::-1]) for i in range(len(r) - 4))
_MASHED = re.compile(
    rf"[a-z]*(?:j[bcdfghklmnpqrstvwxz]|q[bcdfghjklmnprstvxz]|[bcdfghjklmnpqrstvwxz]{{6}}|{_WALKS})[a-z]*|[bcdfghjklmnpqrstvwxz]{{5,}}",
    re.IGNORECASE,
)
"""A word that nobody pronounces: pairs of letters and runs of consonants that no word has, or five keys in a row."""

LOOP_BYTES, LOOP_WORDS = 40, 8
"""Shorter texts repeat themselves without being stuck."""


def incoherent(text: str) -> str:
    """Why a text is no language, or "" if it is."""
    text = text.strip()
    if not text:
        return "empty"
    if _SPECIAL.search(text):
        text = _SPECIAL.sub(" ", text).strip()
        if not _ROLE.sub("", text).strip():
            return "special tokens only"
    if not _FENCE.sub("", text).strip():
        return "an empty code block"
    if not any(c.isalnum() or unicodedata.category(c) == "So" for c in text):  # So: an emoji may answer
        return "no words"
    if _one_character(text):
        return "one character again and again"
    content = _RULED.sub(r"\1", text.lower()).encode()
    packed, size = len(zlib.compress(content, 9)), len(content)
    # What a loop packs into is about as long however often it turns, so short texts may shrink less.
    if size >= LOOP_BYTES and packed / size < max(0.22, 0.16 + 17 / size):
        return "repeats itself"
    words = [word for token in text.lower().split() if (word := token.strip(".,:;!?\"'()[]*|"))]
    written = sum(any(map(str.isalpha, word)) for word in words)
    prose = written >= LOOP_WORDS and 2 * written >= len(words)  # a table of numbers is none
    if prose and len(set(words)) / len(words) < max(0.18, 0.15 + 1.5 / len(words)):
        return "repeats itself"
    if _mashed(text):
        return "keys, no words"
    return "words without grammar" if _salad(text) else ""


def _one_character(text: str) -> bool:
    """Whether one letter makes most of a text, or one sign most of a text without letters."""
    seen = Counter("".join(text.split()))
    character, n = seen.most_common(1)[0]
    return seen.total() >= 8 and n / seen.total() > 0.6 and (character.isalpha() or not any(map(str.isalnum, seen)))


def _mashed(text: str) -> bool:
    """Whether half of the letters stand in words that nobody pronounces. Capitals alone are abbreviations."""
    words = [w for w in re.findall(r"[A-Za-z]+", _LINK.sub("", text)) if not w.isupper()]
    mashed = sum(len(w) for w in words if _MASHED.fullmatch(w))
    return mashed >= 8 and 2 * mashed >= sum(map(len, words))


def _salad(text: str) -> bool:
    """Whether a dozen words or more follow each other without a sign between them and hardly a short one among them: every
    language that writes its words apart has such words for its grammar, and lists have signs or lines of their own."""
    words = text.rstrip(".!?").split(" ")
    if len(words) < 12 or not all(map(str.isalpha, words)):
        return False
    return sum(len(w) <= 3 for w in words) < len(words) / 12
