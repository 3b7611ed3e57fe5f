"""A guard behind the model: a second model reads every answer, and a harmful one is replaced by a refusal."""

from __future__ import annotations

from collections.abc import Sequence

from safegene import models
from safegene.baselines.method import Cost, Method, Protected, Setting
from safegene.errors import DataError
from safegene.models import LoadedModel
from safegene.progress import Advance

REPLACED = "I cannot help with that."


class Guard(Method):
    """The bench's offline judge as guard, or any other that `Setting.judge` is given. It must not be the judge that then
    measures: it would find itself without fault."""

    name = "guard"
    source = "Inan et al. 2023, arXiv 2312.06674; Zhang et al. 2024 (ShieldLM), arXiv 2402.16444"

    def protect(self, loaded: LoadedModel, setting: Setting) -> Protected:
        judge = setting.judge
        if judge is None:
            raise DataError("the guard needs a judge that says which answers are harmful; give the bench one.")

        def answer(prompts: Sequence[str], tokens: int, advance: Advance) -> list[str]:
            said = models.generate(loaded.model, loaded.tokenizer, prompts, tokens, done=advance)
            return [REPLACED if bad else text for bad, text in zip(judge(prompts, said), said, strict=True)]

        reader = 135_000_000  # the offline judge's; read once an answer
        return Protected(
            loaded.model, loaded.tokenizer, answer, Cost(extra_parameters=reader, extra_tokens=184), whole=False
        )
