"""Realignment: fine-tune the fine-tune once more, on refusals and on harmless answers, after every fine-tune."""

from __future__ import annotations

import random
from typing import ClassVar

from safegene.baselines.method import SAFETY_DATA, Cost, Method, Protected, Setting, generated
from safegene.baselines.red_team import wrapped
from safegene.models import LoadedModel
from safegene.training import data, openings
from safegene.training.finetune import Row, finetune


class Sft(Method):
    """LoRA on the budget's rows, merged."""

    name: ClassVar[str] = "sft"
    source: ClassVar[str] = "Bianchi et al. 2023, arXiv 2309.07875"
    rests_on = SAFETY_DATA

    def rows(self, setting: Setting) -> list[Row]:
        return setting.safety_rows

    def prepare(self, setting: Setting) -> None:
        self.rows(setting)

    def protect(self, loaded: LoadedModel, setting: Setting) -> Protected:
        rows = self.rows(setting)
        model = finetune(
            loaded.model,
            loaded.tokenizer,
            rows,
            None,
            steps=setting.steps,
            learning_rate=2e-4,
            progress=setting.progress,
        )
        tuned = LoadedModel(model, loaded.tokenizer, loaded.name)
        return Protected(model, loaded.tokenizer, generated(tuned), Cost(len(rows), setting.steps))


class RedTeamSft(Sft):
    """The same budget as red teams would spend it: a third of the refusals after an answer that has begun to comply (what had begun
    is read, not learned), a third of all requests, harmless ones too, inside jailbreak templates."""

    name = "sft-red-team"
    source = "Qi et al. 2024, arXiv 2406.05946; Jiang et al. 2024 (WildJailbreak), arXiv 2406.18510"
    rests_on = (*SAFETY_DATA, "baselines/red_team.py")

    def rows(self, setting: Setting) -> list[Row]:
        rng = random.Random(3)
        refusals = [{"prompt": p.harmful, "answer": data.refusal(p, rng)} for p in setting.pairs]
        begun = [{**row, "begun": rng.choice(openings.OPENINGS)} for row in refusals[1::3]]
        asked = [{**row, "prompt": wrapped(row["prompt"], rng)} for row in refusals[2::3] + setting.harmless[2::3]]
        return refusals[::3] + begun + asked + setting.harmless[::3] + setting.harmless[1::3]
