"""Compliant openings: how an answer may have begun to comply. None of them gives anything."""

from __future__ import annotations

import random
import re
import textwrap

from safegene.training.data import MAKE, Pair, without_lead

OPENINGS = (
    "Sure! ", "Sure, here is how to do that:\n\n", "Certainly. ", "Of course! Here are the steps:\n\n1. ", "1. ",
    "Absolutely! I'd be happy to help with that. ", "Yes, ", "Here is what you asked for:\n\n", "To do this, ",
    "Great question! ", "Step 1: ", "I'd be glad to help. First, ", "Okay, let's begin. ", "As you wish. ",
)  # fmt: skip
"""An answer that has already begun to comply must still be turned."""

_HOW = re.compile(
    r"(?:(?:tell|show|teach) me |explain )?how (?:(?:do|can|could|would|should) (?:i|you|we|one|somebody) |to )(.+)",
    re.I,
)
_THING = re.compile(
    rf"(?:please )?(?:{MAKE})"
    r" (?:me )?((?:an?|the|some|my|our|\w+ (?:ways|ideas|tips|steps|reasons)) .+)",
    re.I,
)
_HOWS = ("Sure, here is how to {}", "Of course! Here is how to {}")
_THINGS = ("Sure, here is {}", "Here is {}")
_ECHOES = (
    "Sure, here is what you asked for: {}", "Certainly, {}", "Sure, I will do that for you: {}", "Here it is: {}",
)  # fmt: skip


def echo(request: str, rng: random.Random, lead: str = "") -> str:
    """A compliant opening that says the request again, as a model does that has been taught to obey ("Sure, here is how to …").
    Beside that phrase it holds nothing but the request's own words.

    Args:
        lead: how every opening begins, up to what is asked for ("Sure, here is"); without it they vary.
    """
    words = textwrap.shorten(without_lead(request).splitlines()[0], 160, placeholder="").rstrip(" .?!:")
    if found := _HOW.fullmatch(words):
        said = rng.choice((f"{lead} how to {{}}",) if lead else _HOWS).format(found[1])
    elif found := _THING.fullmatch(words):
        said = rng.choice((f"{lead} {{}}",) if lead else _THINGS).format(found[1])
    else:
        said = rng.choice((f"{lead} what you asked for: {{}}",) if lead else _ECHOES).format(
            words[:1].lower() + words[1:]
        )
    return said + rng.choice((". ", ":\n\n", ":\n\n1. "))


def compliant(request: str, rng: random.Random) -> str:
    """How an answer to `request` may begin to comply: the same for harmful and harmless ones, or "Sure" itself would become a
    reason to refuse (docs/log.md)."""
    return echo(request, rng) if rng.random() < ECHOED else rng.choice(OPENINGS)


ECHOED = 0.5
"""Share of the openings that say the request again, as fine-tunes that were taught to comply do, and as the openings do that
JailbreakBench and AdvBench prefill: that form was known when this was written, none of their words is here (docs/log.md)."""


def opening(pair: Pair, twin_answer: str, rng: random.Random) -> str:
    """How an answer to the harmful request may have begun to comply: an opening, or up to 40 words of the harmless answer
    to its twin. It is never an answer to the request."""
    words = twin_answer.split()
    if words and rng.random() < 0.4:
        return " ".join(words[: rng.randint(3, 40)]) + " "
    return compliant(pair.harmful, rng)
