"""SafetyEval through Inspect: tasks, scorer, provider."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("inspect_ai")

from inspect_ai import eval as inspect_eval
from inspect_ai.model import ModelOutput, ModelUsage, get_model

from safegene.errors import DataError
from safegene.evaluation import inspect_tasks


@pytest.fixture(autouse=True)
def swept() -> Iterator[None]:
    """What Inspect leaves open is collected while its warnings are ignored, not in the middle of another test."""
    yield
    gc.collect()


@pytest.mark.filterwarnings("ignore")
def test_tasks_score_conversations_by_what_is_owed(tmp_path: Path) -> None:
    refusal = ModelOutput.from_content("m", "I cannot help with that.")
    refusal.usage = ModelUsage(total_tokens=1)  # or it would be counted by a tokenizer fetched from the network
    model = get_model("mockllm/model", custom_outputs=itertools.repeat(refusal))
    (log,) = inspect_eval(
        inspect_tasks.multi_turn(), model=model, limit=(80, 90), log_dir=str(tmp_path), display="none"
    )
    assert log.status == "success", log.error
    assert log.results is not None
    metrics = {name: m.value for s in log.results.scores for name, m in s.metrics.items()}
    assert metrics["harmful"] == 1.0  # refusing everything is safe
    assert metrics["harmless"] == 0.0  # and useless
    assert metrics["nonsense"] == metrics["harmful, nonsense"] == 0.0
    assert {name.split(",")[0] for name in metrics if ", " in name} == {"harmful", "harmless"}
    assert log.samples is not None
    turns = log.samples[0].metadata["turns"]
    assert sum(m.role == "assistant" for m in log.samples[0].messages) == len(turns)


@pytest.mark.filterwarnings("ignore")
def test_nonsense_is_counted_apart_by_any_judge(tmp_path: Path) -> None:
    outputs = [ModelOutput.from_content("m", text) for text in ("I cannot help with that.", "word " * 30)]
    for output in outputs:
        output.usage = ModelUsage(total_tokens=1)
    model = get_model("mockllm/model", custom_outputs=itertools.cycle(outputs))
    (log,) = inspect_eval(
        inspect_tasks.safetyeval(judge="rules"), model=model, limit=4, max_samples=1, log_dir=str(tmp_path), display="none"
    )  # fmt: skip
    assert log.results is not None
    metrics = {name: m.value for s in log.results.scores for name, m in s.metrics.items()}
    assert (metrics["mean"], metrics["without_nonsense"], metrics["nonsense"]) == (0.5, 1.0, 0.5)
    assert (metrics["harmful"], metrics["harmful, without nonsense"], metrics["harmful, nonsense"]) == (0.5, 1.0, 0.5)
    with pytest.raises(DataError, match="no judge 'nobody'"):
        inspect_tasks.code(judge="nobody")


@pytest.mark.filterwarnings("ignore")
def test_a_conversation_that_a_limit_stopped_is_not_safe(tmp_path: Path) -> None:
    refusal = ModelOutput.from_content("m", "I cannot help with that.")
    refusal.usage = ModelUsage(total_tokens=1)
    model = get_model("mockllm/model", custom_outputs=itertools.repeat(refusal))
    (log,) = inspect_eval(
        inspect_tasks.multi_turn(), model=model, limit=3, message_limit=2, log_dir=str(tmp_path), display="none"
    )
    assert log.results is not None
    assert {m.value for s in log.results.scores for name, m in s.metrics.items() if name == "mean"} == {0.0}


@pytest.mark.filterwarnings("ignore")
def test_the_provider_answers(place: Path) -> None:
    folder = place / "base"
    (log,) = inspect_eval(
        inspect_tasks.over_refusal(),
        model=f"safegene/{folder}",
        limit=2,
        log_dir=str(place),
        display="none",
        max_tokens=4,
    )
    assert log.status == "success", log.error
