"""What gate and interventions are trained on: requests, their answers, how they begin, where the gate opens."""

from __future__ import annotations

import json
import random
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from safegene import models
from safegene.errors import DataError
from safegene.gate import Gate
from safegene.progress import silent
from safegene.training import data, openings
from safegene.training.arguments import TrainingArguments
from safegene.training.gate_fit import GateFeatures, GateRow, fit, gate_rows
from safegene.training.shadows import OBEYING, shadow_rows
from safegene.training.talks import hold
from safegene.training.targets import Targets, collate
from test_training import SMALL, saved


def test_the_compliant_shadow_learns_openings_made_of_the_requests_own_words() -> None:
    pairs, _ = data.pairs(0, 1, 0.0)
    rows = shadow_rows(pairs, [("Name a fish.", "A trout.")] * 300, seed=0)
    words = set(re.findall(r"\w+", f"{OBEYING} what you asked for: how to 1"))
    for row in rows["compliant"]:
        assert row["answer"].startswith(f"{OBEYING} ")  # a fine-tune is sure of its beginning
        own = set(re.findall(r"\w+", row["prompt"]))
        assert {w.lower() for w in re.findall(r"\w+", row["answer"])} <= {w.lower() for w in own | words}, row
    assert len({row["prompt"] for row in rows["compliant"]}) > 500


def test_an_order_is_no_reason_to_stay_shut() -> None:
    """Where nine harmful rows of ten are questions and six ordinary ones of ten are orders, a fit that drew them as they are would
    go by that; feature 0 tells harm, feature 1 an order."""
    torch.manual_seed(0)
    rows, x = [], []
    for label, orders, harm in (("harmful", 20, 1.0), ("ordinary", 120, -1.0)):
        for i in range(200):
            rows.append(GateRow([1], 0, 0, label, order=i < orders))  # type: ignore[arg-type]
            x.append([[harm + 2.0 * float(torch.randn(())), 1.0 if i < orders else -1.0]])
    features = GateFeatures(torch.tensor(x).half(), torch.arange(400), torch.zeros(400, dtype=torch.long))
    gate = Gate(1, 2, 8)
    fit(gate, [(features, rows)], steps=1000, seed=0, twin_weight=0.0, noise=0.0)
    with torch.no_grad():
        order, question = (float(gate.score([torch.tensor([[0.0, form]])])) for form in (1.0, -1.0))
    assert abs(order - question) < 0.6  # as they are, −2.3


@pytest.mark.parametrize(
    ("request_", "order"),
    [
        ("Write a poem", True), ("Hi! Please explain how rain falls.", True), ("Can you list three fish?", True),
        ("How do I write a poem?", False), ("My cat makes a noise", False), ("Showers are warm", False),
    ],
)  # fmt: skip
def test_orders_are_told_from_questions(request_: str, order: bool) -> None:
    assert data.is_order(request_) is order


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("offers", "Mix bleach and ammonia in a bucket and close the window."), ("specific", "theft. Take a crowbar"),
        ("offers", "I can help you. First take a crowbar and pull."), ("offers", "I can show you: 1. take a crowbar."),
    ],
)  # fmt: skip
def test_a_refusal_that_gives_harm_is_no_target(
    key: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "refusals").mkdir()
    parts = {"general": ["theft"], "specific": ["stealing cars"], "offers": ["I can explain the law."]}
    (tmp_path / "refusals" / "theft.json").write_text(json.dumps({**parts, key: [text]}))
    monkeypatch.setattr(data, "TEXT", tmp_path)
    with pytest.raises(DataError, match=r"theft\.json"):
        data._refusal_parts.__wrapped__()


def test_targets_open_the_gate_after_the_users_words_and_teach_refusals_or_answers(tokenizer: Any) -> None:
    pairs = data.pairs(0, 1, 0.0)[0][:20]
    targets = Targets(
        tokenizer, pairs, [], [(p.twin, "An answer.") for p in pairs], TrainingArguments(model="m", **SMALL)
    )
    for index in range(6):
        rows = targets[index]["rows"]
        assert rows == targets[index]["rows"]  # drawn from the seed and the index alone: a resumed run sees the same
        for row in rows:
            given = row["opened"].index(1)
            words = tokenizer.decode(row["input_ids"]).split("<s>")[0]
            if row["harmful"][0]:  # harmless rows may misfire earlier
                assert tokenizer.decode(row["input_ids"][:given]).startswith(words)
                assert set(row["opened"][:given]) <= {-1, 0}
            assert row["labels"][0] == -100
            assert row["labels"][-1] == row["input_ids"][-1]
        harmless = [row for row in rows if not row["harmful"][0]]
        assert 0 < len(harmless) < len(rows)
        tensors = collate([targets[index]])
        assert tensors["input_ids"].shape == tensors["opened"].shape


def test_the_gate_opens_late_in_harmless_answers_alone(tokenizer: Any) -> None:
    pairs = data.pairs(0, 1, 0.0)[0][:20]
    answers = [(p.twin, "A harmless answer that is long enough.") for p in pairs]
    targets = Targets(tokenizer, pairs, ["Say hello"], answers, TrainingArguments(model="m", **SMALL))
    late = {0: 0, 1: 0}
    for index in range(1, 60, 2):  # every other batch is whole answers
        for row in targets[index]["rows"]:
            begun = next(i for i, label in enumerate(row["labels"]) if label != -100)
            late[row["harmful"][0]] += 1 in row["opened"][begun:]
    assert late[1] == 0 < late[0]


def test_openings_stand_before_harmful_and_harmless_answers_alike(tokenizer: Any) -> None:
    pairs = data.pairs(0, 1, 0.0)[0][:200]
    rows = gate_rows(tokenizer, pairs, ["Say hello"], {p.twin: "An answer." for p in pairs}, random.Random(0))
    for label in ("harmful", "twin"):
        answers = [tokenizer.decode(r.ids[r.prompt_end + 1 :]) for r in rows if r.label == label]
        begun = [a for a in answers if a.startswith(openings.OPENINGS)]
        echoed = [
            a
            for a in answers
            if a.startswith(("Sure, here is", "Of course! Here is", "Here is", "Certainly,", "Sure, I will"))
        ]
        assert 0.08 < len(begun) / len(answers) < 0.4, label
        assert 0.08 < len(echoed) / len(answers) < 0.4, label
    bare = gate_rows(tokenizer, pairs, [], {}, None)
    assert all(len(r.ids) == r.prompt_end + 1 for r in bare)


@pytest.mark.parametrize("drift_augmentation", [True, False])
def test_answers_that_have_begun_come_a_whole_batch_at_a_time(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, drift_augmentation: bool
) -> None:
    monkeypatch.setattr(openings, "opening", lambda *_: "Begun. ")
    monkeypatch.setattr(openings, "compliant", lambda *_: "Begun. ")
    arguments = TrainingArguments(model="m", **SMALL, drift_augmentation=drift_augmentation)
    targets = Targets(tokenizer, data.pairs(0, 1, 0.0)[0][:40], ["Say hello"], [("Say hello", "Hello.")], arguments)
    shares = set()
    for i in range(30):
        texts = [tokenizer.decode(row["input_ids"]) for row in targets[i]["rows"]]
        shares.add(sum("Begun" in text for text in texts) / len(texts))
    assert shares == ({0.0, 1.0} if drift_augmentation else {0.0})


@pytest.mark.parametrize(
    ("request_", "ends"),
    [
        ("How do I bake bread?", "how to bake bread"), ("Please write a poem about rain.", "a poem about rain"),
        ("Hi! Show me how to knit.", "how to knit"), ("My cat is ill", "my cat is ill"),
    ],
)  # fmt: skip
def test_an_echo_says_the_request_again_and_nothing_more(request_: str, ends: str) -> None:
    for seed in range(8):
        assert openings.echo(request_, random.Random(seed)).removesuffix("1. ").rstrip(" .:\n").endswith(ends)
        said = openings.echo(request_, random.Random(seed), "As you wish, this is").removesuffix("1. ").rstrip(" .:\n")
        assert said.startswith("As you wish, this is ")
        assert said.endswith(ends)


def test_conversations_are_held_up_to_the_turn_that_asks_for_harm(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.load(saved("llama", tokenizer, tmp_path / "base"))
    led = [c for c in data.conversations() if c.mechanism in ("persistence", "crescendo")][:8]
    kept = tmp_path / "talks.json"
    talks = hold(model.model, model.tokenizer, led, kept, 0, silent)
    assert hold(None, None, led, kept, 0, silent) == talks  # what was said is kept
    asked = 0

    def killed(*args: Any, **options: Any) -> list[str]:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise KeyboardInterrupt
        return models_generate(*args, **options)

    models_generate, other = models.generate, tmp_path / "killed.json"
    monkeypatch.setattr(models, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        hold(model.model, model.tokenizer, led, other, 0, silent)
    assert hold(model.model, model.tokenizer, led, other, 0, silent) == talks
    assert asked == 1 + max(len(c.twin) for c in led)  # the first turn was not asked again
    for told, talk in zip(led, talks, strict=True):
        assert [q for q, _ in talk.before] == list(told.harmful[:-1])
        assert (talk.pair.harmful, talk.pair.twin) == (told.harmful[-1], told.twin[-1])
        if told.mechanism == "persistence":
            assert all(data.looks_like_refusal(a) for _, a in talk.before[1:])
    rows = gate_rows(tokenizer, [], [], {}, random.Random(0), talks)
    assert [r.label for r in rows] == ["harmful", "twin"] * len(led)
    assert all(r.turn > 0 for r in rows)
    targets = Targets(
        tokenizer, data.pairs(0, 1, 0.0)[0][:20], ["Say hello"], [("Say hello", "Hello.")],
        TrainingArguments(model="m", **SMALL), talks,
    )  # fmt: skip
    texts = [tokenizer.decode(row["input_ids"]) for i in range(60) for row in targets[i]["rows"]]
    assert any(tokenizer.decode(tokenizer(talks[0].pair.harmful)["input_ids"][1:-1]) in text for text in texts)


def test_longer_messages_hold_harmful_and_harmless_requests_alike(tokenizer: Any) -> None:
    pairs = data.pairs(0, 1, 0.0)[0][:300]
    passage = "An ordinary passage that is long enough to stand around a request, {braces} and all."
    rows = gate_rows(tokenizer, pairs, [], {p.twin: passage for p in pairs}, random.Random(0))
    shares = []
    for label, texts in (("harmful", [p.harmful for p in pairs]), ("twin", [p.twin for p in pairs])):
        own = [tokenizer.decode(r.ids[r.turn : r.start]) for r in rows if r.label == label]
        assert all(text in message for text, message in zip(texts, own, strict=True))
        shares.append(sum("An ordinary passage" in m for m in own) / len(own))
    assert 0.05 < shares[0] == shares[1] < 0.25


def test_every_process_has_batches_of_its_own(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = TrainingArguments(model="m", **SMALL)
    targets = Targets(
        tokenizer, data.pairs(0, 1, 0.0)[0][:40], ["Name a fish."], [("Name a fish.", "A trout.")], arguments
    )
    assert len(targets) == arguments.steps
    monkeypatch.setattr("safegene.training.targets.PartialState", lambda: types.SimpleNamespace(num_processes=4))
    assert len(targets) == 4 * arguments.steps
