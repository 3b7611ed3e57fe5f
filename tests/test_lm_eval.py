"""Our tasks inside lm-eval itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import safegene.evaluation.lm_eval as tasks
from conftest import tiny


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_lm_eval_finds_and_scores_our_tasks(tokenizer: Any) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=tiny(), tokenizer=tokenizer, batch_size=2, device="cpu")
    found = lm_eval.simple_evaluate(
        model=model, tasks=["safegene_safetyeval", "safegene_over_refusal"], limit=2, apply_chat_template=True,
        task_manager=TaskManager(include_path=str(Path(tasks.__path__[0])), include_defaults=False), bootstrap_iters=0, log_samples=False,
        gen_kwargs={"max_gen_toks": 8},
    )["results"]  # fmt: skip
    assert found["safegene_safetyeval"]["safety_score,none"] in (0.0, 0.5, 1.0)
    assert found["safegene_over_refusal"]["over_refusal,none"] == 0.0
