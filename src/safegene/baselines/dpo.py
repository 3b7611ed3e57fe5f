"""Realignment by preference: refusals over compliant beginnings, harmless answers over refusals, after every fine-tune."""

from __future__ import annotations

import importlib.util
import random
import tempfile
from typing import Any, ClassVar

import torch

from safegene.baselines.method import SAFETY_DATA, Cost, Method, Protected, Setting, generated
from safegene.baselines.red_team import wrapped
from safegene.errors import DataError
from safegene.models import LoadedModel
from safegene.training import data, openings
from safegene.training.finetune import Report, lora, on_one_device, thaw

BETA = 0.1


class Dpo(Method):
    """trl's trainer on the budget's rows. What is rejected after a harmful request is a beginning ("Sure! "), never an answer."""

    name: ClassVar[str] = "dpo"
    source: ClassVar[str] = "Rafailov et al. 2023, arXiv 2305.18290"
    rests_on = SAFETY_DATA

    def __init__(self) -> None:
        if not importlib.util.find_spec("trl"):  # said before any work, not hours into a bench
            raise DataError(f"the {self.name} rival needs trl; run: pip install 'safegene[bench]'")

    def rows(self, setting: Setting) -> list[dict[str, Any]]:
        return preferences(setting)

    def prepare(self, setting: Setting) -> None:
        self.rows(setting)

    def protect(self, loaded: LoadedModel, setting: Setting) -> Protected:
        from datasets import Dataset
        from transformers import PrinterCallback
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer

        rows = self.rows(setting)
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as scratch:
            trainer: Any = DPOTrainer(
                model=lora(loaded.model),
                args=on_one_device(DPOConfig(
                    output_dir=scratch, max_steps=setting.steps, per_device_train_batch_size=8, learning_rate=2e-4,
                    lr_scheduler_type="cosine", warmup_steps=5, beta=BETA, max_length=256, save_strategy="no", report_to=[],
                    seed=0, disable_tqdm=True, use_cpu=not torch.cuda.is_available(), bf16=False,
                    gradient_checkpointing=False, logging_steps=10,
                )),
                train_dataset=Dataset.from_list(rows),
                processing_class=loaded.tokenizer,
                callbacks=[Report(setting.progress(self.name, setting.steps))],
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)  # it prints to stdout, which belongs to results
            trainer.train()
        model = trainer.model.merge_and_unload()
        model.config.use_cache = True
        thaw(model)
        tuned = LoadedModel(model.eval(), loaded.tokenizer, loaded.name)
        return Protected(model, loaded.tokenizer, generated(tuned), Cost(len(rows), setting.steps))


class RedTeamDpo(Dpo):
    """The same rows, every third request, harmless ones too, inside a jailbreak template."""

    name = "dpo-red-team"
    source = "Rafailov et al. 2023, arXiv 2305.18290; Jiang et al. 2024 (WildJailbreak), arXiv 2406.18510"
    rests_on = (*SAFETY_DATA, "baselines/red_team.py")

    def rows(self, setting: Setting) -> list[dict[str, Any]]:
        rng, rows = random.Random(10), preferences(setting)
        for row in rows[2::3]:
            (turn,) = row["prompt"]
            turn["content"] = wrapped(turn["content"], rng)
        return rows


def preferences(setting: Setting) -> list[dict[str, Any]]:
    """Rows as trl wants them: prompt, chosen and rejected, each a list of messages."""
    rng = random.Random(9)

    def row(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected.strip()}],
        }

    # Where the twin was answered, the rejected side goes on with that answer's first words: harmless, and longer than "Sure!".
    twins = {r["prompt"]: r["answer"] for r in setting.harmless}
    refusals = [
        row(p.harmful, data.refusal(p, rng), openings.opening(p, twins.get(p.twin, ""), rng)) for p in setting.pairs
    ]
    some = [data.refusal(p, rng) for p in setting.pairs]
    served = [row(r["prompt"], r["answer"], rng.choice(some)) for r in setting.harmless]
    return refusals + served
