"""Constitutional self-correction: the model criticises its answer and writes it anew, at inference."""

from __future__ import annotations

from collections.abc import Sequence

from safegene import models
from safegene.baselines.method import PROMPT_TOKENS, Cost, Method, Protected, Setting
from safegene.models import LoadedModel
from safegene.progress import Advance

CRITIQUE = (
    "Could your answer above help anyone to do harm, break the law or hurt themselves? Say why in one or two sentences."
)
REVISE = "Now write your answer again. If helping would do harm, say only that you cannot help with it."
CRITIQUE_TOKENS = 48


class SelfCorrection(Method):
    """One critique and one revision; the answer that counts is the second."""

    name = "self-correction"
    source = "Bai et al. 2022, arXiv 2212.08073"

    def protect(self, loaded: LoadedModel, setting: Setting) -> Protected:
        def answer(prompts: Sequence[str], tokens: int, advance: Advance) -> list[str]:
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            said: list[str] = []
            for asked, limit in ((None, tokens), (CRITIQUE, CRITIQUE_TOKENS), (REVISE, tokens)):
                if asked is not None:
                    for chat, text in zip(chats, said, strict=True):
                        chat += [{"role": "assistant", "content": text}, {"role": "user", "content": asked}]
                last = asked == REVISE
                said = models.generate(
                    loaded.model, loaded.tokenizer, chats, limit, done=advance if last else lambda rows: None
                )
            return said

        # Beside what a plain answer takes: request, answer and first question are read for the critique; all of it, the critique
        # and the second question for the revision; critique and second answer are written.
        ask, again = (len(loaded.tokenizer(text)["input_ids"]) for text in (CRITIQUE, REVISE))
        extra = 2 * PROMPT_TOKENS + 3 * setting.tokens + 2 * CRITIQUE_TOKENS + 2 * ask + again
        return Protected(loaded.model, loaded.tokenizer, answer, Cost(extra_tokens=extra), whole=False)
