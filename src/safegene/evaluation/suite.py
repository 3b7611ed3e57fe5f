"""SafetyEval's suites: which requests are put to a model, and what a careful assistant owes each of them.

A suite is a factory of samples under a name (`@suite`); `load` reads one, `suites` lists them. The content is the project's
own, written for it, one JSONL file a category in `content/`: requests only, nothing answers them; `content/manifest.json` tells
its version, licence and counts. Public sets stand beside it (`public_suites`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safegene.errors import DataError

CONTENT = Path(__file__).parent / "content"


def manifest() -> dict[str, Any]:
    """Version, provenance, licence and counts of the content.

    Raises:
        DataError: missing or damaged.
    """
    path = CONTENT / "manifest.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {**found, "version": str(found["version"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}); install safegene again.") from error


CONTENT_VERSION: str = manifest()["version"]
"""Raised in the manifest with every change of the content; runs of different versions are not compared."""

CATEGORIES = (
    "violent_crimes", "nonviolent_crimes", "mass_harm_weapons", "hate", "harassment_defamation", "suicide_self_harm",
    "sexual_nonconsent", "privacy", "intellectual_property", "specialised_advice", "elections_disinformation",
    "cyber_crime", "fraud_deception", "regulated_substances", "animals_environment",
)  # fmt: skip
"""The fifteen harm categories; docs/adr/0006 maps them to AILuminate, HarmBench, StrongREJECT and BeaverTails."""

VERTICALS = ("medical", "legal", "finance")


@dataclass(frozen=True)
class Sample:
    """One request or conversation.

    Attributes:
        id: stable; a later content version may reword a text under its id.
        turns: the user's turns, at least one.
        harmful: whether a careful assistant must refuse or turn to help (from turn `harmful_from` on), or must answer.
        form: how it is asked, such as "question" or "role_play"; for conversations the strategy.
        severity: 1 money or dignity, 2 serious harm to a person, 3 death or harm to many; 0 where harmless or unknown.
        twin_of: id of the harmful request whose words a harmless one shares.
        wrapper: name of the jailbreak wrapper around it (see `wrappers`).
        opening: text already standing in the answer to the last turn.
        source: "SafetyEval" and its version, or the public set it comes from.
    """

    id: str
    category: str
    harmful: bool
    turns: tuple[str, ...]
    form: str = ""
    severity: int = 0
    harmful_from: int = 0
    twin_of: str = ""
    wrapper: str = ""
    opening: str = ""
    source: str = f"SafetyEval {CONTENT_VERSION}"


@dataclass(frozen=True)
class Suite:
    """A named list of samples, with what it is for in one line."""

    name: str
    about: str
    make: Callable[[], list[Sample]]


_SUITES: dict[str, Suite] = {}


def suite(about: str) -> Callable[[Callable[[], list[Sample]]], Callable[[], list[Sample]]]:
    """Register a factory of samples under its own name."""

    def register(make: Callable[[], list[Sample]]) -> Callable[[], list[Sample]]:
        make.__doc__ = f"Samples: {about}."
        _SUITES[make.__name__] = Suite(make.__name__, about, make)
        return make

    return register


def suites() -> tuple[Suite, ...]:
    """Every suite of the project's own."""
    from safegene.evaluation import wrappers  # noqa: F401  registers its suite

    return tuple(_SUITES.values())


def load(name: str) -> list[Sample]:
    """The samples of a suite, in a fixed order.

    Raises:
        DataError: no such suite, or its content is damaged.
    """
    known = {s.name: s for s in suites()}
    if name not in known:
        from safegene.evaluation.public_suites import PUBLIC

        raise DataError(f"no suite '{name}'; there are {', '.join(known)}, and with --data {', '.join(PUBLIC)}.")
    return known[name].make()


@suite("what a careful assistant refuses, in fifteen harm categories")
def safetyeval() -> list[Sample]:
    return [s for category in CATEGORIES for s in read(category, "harmful")]


@suite("harmless twins of those requests: the same words, nothing wrong in the wish")
def over_refusal() -> list[Sample]:
    return [s for category in CATEGORIES for s in read(category, "twins")]


@suite("scripted conversations that lead to harm step by step, and harmless long ones; scored at every turn")
def multi_turn() -> list[Sample]:
    return read("multi_turn", "harmful") + read("multi_turn", "twins")


@suite("malicious code, and dual-use or defensive code that should be written")
def code() -> list[Sample]:
    return read("code", "harmful") + read("code", "twins")


@suite("medicine: what breaks its ethics or hurts a patient, and twins")
def medical() -> list[Sample]:
    return read("vertical_medical", "harmful") + read("vertical_medical", "twins")


@suite("law: invented citations, forged evidence and the like, and twins")
def legal() -> list[Sample]:
    return read("vertical_legal", "harmful") + read("vertical_legal", "twins")


@suite("finance: misled clients, hidden losses and the like, and twins")
def finance() -> list[Sample]:
    return read("vertical_finance", "harmful") + read("vertical_finance", "twins")


def read(name: str, side: str) -> list[Sample]:
    """One content file; `side` is harmful or twins.

    Raises:
        DataError: missing, or a line that is no sample; the message names it.
    """
    path = CONTENT / f"{name}-{side}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").strip().split("\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); install safegene again.") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(_sample(json.loads(line), side == "harmful"))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number} is no sample ({error}); install safegene again.") from error
    return found


def _sample(row: dict[str, Any], harmful: bool) -> Sample:
    turns = tuple(row["turns"]) if "turns" in row else (row["prompt"],)
    if not all(isinstance(t, str) and t.strip() for t in turns):
        raise ValueError("a turn is empty")
    return Sample(
        id=row["id"], category=row["category"], harmful=harmful, turns=turns, form=row["form"],
        severity=int(row.get("severity", 0)), harmful_from=int(row.get("harmful_from", 0)),
        twin_of=row.get("twin_of", ""),
    )  # fmt: skip


def sample_evenly(samples: Sequence[Sample], n: int) -> list[Sample]:
    """`n` samples, or all of them for n = 0: one of every category (of every wrapper) in turn, inside each in the order of
    their ids' hashes, so that a smaller sample is the beginning of a larger one."""
    if n <= 0 or n >= len(samples):
        return list(samples)
    groups: dict[str, list[Sample]] = {}
    for s in sorted(samples, key=lambda s: hashlib.sha256(s.id.encode()).digest()):
        groups.setdefault(s.wrapper or f"{s.category}/{s.harmful}", []).append(s)
    turns = itertools.zip_longest(*(groups[k] for k in sorted(groups)))
    return [s for turn in turns for s in turn if s is not None][:n]


def digest(samples: Sequence[Sample]) -> str:
    """SHA-256 over ids and texts: two runs with the same digest were asked the same."""
    rows = [[s.id, s.turns, s.opening] for s in samples]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def wrapped(sample: Sample, wrapper: str, turn: str, opening: str = "") -> Sample:
    """`sample` with its only turn put into a jailbreak wrapper."""
    return replace(sample, id=f"{sample.id}/{wrapper}", turns=(turn,), wrapper=wrapper, opening=opening)
