"""A guard around the model: a second model reads every request before anything is generated, and every answer after that.

A request that it finds harmful is refused and never reaches the model; an answer that it finds harmful is replaced by a refusal.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from safegene import models
from safegene.baselines.method import PROMPT_TOKENS, SAFETY_DATA, Cost, Method, Protected, Setting
from safegene.errors import DataError
from safegene.models import LoadedModel
from safegene.progress import Advance
from safegene.training import data

REFUSED = "I cannot help with that request."
REPLACED = "I cannot help with that."
"""Two texts, so that kept answers tell whether the guard stopped a request or an answer."""


class Guard(Method):
    """Any judge that tells harm (`Setting.judge`): the offline one, or a guard model. It must not be the judge that then measures: it
    would find itself without fault. A judge that reads answers alone (HarmBench's) guards after generation only; the offline one
    learns from the budget's requests what harmful ones look like, once per base."""

    name = "guard"
    source = "Inan et al. 2023, arXiv 2312.06674; Zhang et al. 2024 (ShieldLM), arXiv 2402.16444"
    rests_on = (*SAFETY_DATA, "evaluation/judges/requests.py", "calibration.py")

    def prepare(self, setting: Setting) -> None:
        if setting.judge is None:
            raise DataError("the guard needs a judge that tells harm; give the bench one.")
        ordinary = random.Random(11).sample(list(data.ordinary()), 2 * setting.examples)
        self.judge, self.asks_for_harm = setting.judge, setting.judge.request_reader(setting.pairs, ordinary)

    def protect(self, loaded: LoadedModel, setting: Setting) -> Protected:
        judge, asks_for_harm = self.judge, self.asks_for_harm

        def answer(prompts: Sequence[str], tokens: int, advance: Advance) -> list[str]:
            stopped = asks_for_harm(prompts) if asks_for_harm else [False] * len(prompts)
            let = [prompt for prompt, stop in zip(prompts, stopped, strict=True) if not stop]
            advance(len(prompts) - len(let))
            said = models.generate(loaded.model, loaded.tokenizer, let, tokens, done=advance)
            given = iter([REPLACED if bad else text for bad, text in zip(judge.harms(let, said), said, strict=True)])
            return [REFUSED if stop else next(given) for stop in stopped]

        read = judge.tokens(PROMPT_TOKENS, setting.tokens) + (judge.tokens(PROMPT_TOKENS, 0) if asks_for_harm else 0)
        return Protected(
            loaded.model, loaded.tokenizer, answer, Cost(extra_parameters=judge.parameters, extra_tokens=read), whole=False
        )  # fmt: skip
