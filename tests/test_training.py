"""Training from nothing to a saved adapter, on tiny random models of the recipes' architectures."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ANCHORS, CONFIGS, random_adapter, tiny
from safegene import models
from safegene.adapter import SafetyAdapter
from safegene.attach import attach
from safegene.calibration import Calibration, calibrate_gate, fold_gate
from safegene.errors import DataError
from safegene.gate import Gate
from safegene.progress import silent
from safegene.realignment import Realignment
from safegene.refusals import REFUSAL_TOKENS
from safegene.training import contamination, data, openings
from safegene.training.arguments import TrainingArguments
from safegene.training.finetune import finetune, on_one_device, thaw
from safegene.training.gate_fit import GateFeatures, GateRow, fit, gate_rows, read
from safegene.training.open_gate import OpenGate, Variant, common_prefix, realigned
from safegene.training.shadows import OBEYING, Drawn, shadow_rows, teach_shadows, variant
from safegene.training.talks import hold
from safegene.training.targets import Targets, collate
from safegene.training.trainer import optimiser, train

SMALL = dict(
    gate_layers=(1, 2), intervention_layers=(2, 3), gate_width=4, rank=2, dtype="float32", frames_per_core=1,
    harmless_answers=16, answer_tokens=4, long_answers=8, long_answer_tokens=6, shadow_steps=1, gate_steps=6, probe_steps=6, steps=4,
    rows_per_step=6, anchors_per_kind=4,
)  # fmt: skip


@pytest.fixture
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, ordinary = data.pairs(0, 1, 0.0)[0], data.ordinary()
    monkeypatch.setattr(data, "pairs", lambda *_args: (pairs[:40], pairs[40:48]))
    monkeypatch.setattr(data, "ordinary", lambda *_args: ordinary[:30])
    talks = data.conversations()[:6]
    monkeypatch.setattr(data, "conversations", lambda: talks)


def saved(name: str, tokenizer: Any, folder: Path) -> str:
    tiny(name).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_compliant_shadow_learns_openings_made_of_the_requests_own_words() -> None:
    pairs, _ = data.pairs(0, 1, 0.0)
    rows = shadow_rows(pairs, [("Name a fish.", "A trout.")] * 300, seed=0)
    words = set(re.findall(r"\w+", f"{OBEYING} what you asked for: how to 1"))
    for row in rows["compliant"]:
        assert row["answer"].startswith(f"{OBEYING} ")  # a fine-tune is sure of its beginning
        own = set(re.findall(r"\w+", row["prompt"]))
        assert {w.lower() for w in re.findall(r"\w+", row["answer"])} <= {w.lower() for w in own | words}, row
    assert len({row["prompt"] for row in rows["compliant"]}) > 500


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_train_attach_and_go_on_after_a_kill(
    name: str, tokenizer: Any, tmp_path: Path, little_text: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = saved(name, tokenizer, tmp_path / "base")
    arguments = TrainingArguments(model=base, **SMALL)
    stages: list[str] = []

    def progress(stage: str, total: int = 0) -> Any:
        stages.append(stage)
        return lambda units: None

    train(arguments, tmp_path / "out", progress=progress)
    adapter = SafetyAdapter.from_pretrained(tmp_path / "out")
    assert any(bool(part.up.abs().sum() > 0) for part in adapter.interventions.values())
    assert {a.label for a in adapter.config.anchors} == {"harmful", "twin", "ordinary"}
    unseen = json.loads((tmp_path / "out" / "gate.json").read_text())["opened_harmful"]
    assert 1 - arguments.misses - 1 / unseen["n"] <= unseen["share"] < 1  # the threshold's place
    loaded = models.load(base)
    attach(loaded.model, adapter, tokenizer=loaded.tokenizer, allow_drift=True).detach()

    def never(*_args: Any, **_options: Any) -> None:
        raise AssertionError("a finished stage ran again")

    generate = models.generate  # how the anchors are refused is looked at again at every end, as `refused` is
    monkeypatch.setattr(
        models, "generate", lambda m, t, prompts, n: generate(m, t, prompts, n) if n == REFUSAL_TOKENS else never()
    )
    monkeypatch.setattr("safegene.training.shadows.tune", never)
    monkeypatch.setattr("safegene.training.trainer.boundary", never)
    again = train(arguments, tmp_path / "out")
    for key, value in again.state_dict().items():
        torch.testing.assert_close(value, adapter.state_dict()[key], atol=1e-5, rtol=1e-5)
    with pytest.raises(DataError, match="other settings"):
        train(TrainingArguments(model=base, **{**SMALL, "seed": 5}), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "training.json").read_text())["rank"] == 2
    assert "fitting the gate" in stages


def test_a_training_that_was_interrupted_ends_like_an_unbroken_one(
    tokenizer: Any, tmp_path: Path, little_text: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = TrainingArguments(model=saved("llama", tokenizer, tmp_path / "base"), **SMALL)
    monkeypatch.setattr("safegene.training.trainer.SAVE_STEPS", 2)
    made = []
    monkeypatch.setattr("safegene.training.trainer.optimiser", lambda *a: made.append(optimiser(*a)) or made[-1])
    unbroken = train(arguments, tmp_path / "unbroken")
    assert len(made[0].state) == sum(
        len(group["params"]) for group in made[0].param_groups
    )  # it is the one that stepped

    def progress(stage: str, total: int = 0) -> Any:
        steps = iter(range(1, 100))

        def advance(units: int) -> None:
            if stage == "training the interventions" and next(steps) == 3:
                raise KeyboardInterrupt

        return advance

    with pytest.raises(KeyboardInterrupt):
        train(arguments, tmp_path / "broken", progress=progress)
    checkpoints = tmp_path / "broken" / "checkpoints"
    assert (checkpoints / "checkpoint-2").exists()
    (checkpoints / "checkpoint-3").mkdir()  # cut off while it was written
    again = train(arguments, tmp_path / "broken")
    for key, value in again.state_dict().items():
        torch.testing.assert_close(value, unbroken.state_dict()[key], atol=1e-4, rtol=1e-4)


def test_two_processes_train_one_adapter(tokenizer: Any, tmp_path: Path) -> None:
    base, script = saved("llama", tokenizer, tmp_path / "base"), Path(__file__).parent / "launched.py"
    launch = ["torch.distributed.run", "--nproc_per_node=2", "--standalone"]  # what `accelerate launch` starts
    ran = subprocess.run(
        [sys.executable, "-m", *launch, str(script), base, str(tmp_path / "out")], env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    adapter = SafetyAdapter.from_pretrained(tmp_path / "out")
    assert any(bool(part.up.abs().sum() > 0) for part in adapter.interventions.values())
    state = json.loads(next((tmp_path / "out" / "checkpoints").glob("*/trainer_state.json")).read_text())
    assert state["global_step"] == 4
    assert {path.name for path in (tmp_path / "out").glob("rank-*")} == {"rank-0", "rank-1"}


def test_a_shadow_pulls_as_hard_as_it_is_told(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny()
    rows = {"cheerful": [{"prompt": f"what is {i}", "answer": "Sure! A number."} for i in range(8)]}
    model = teach_shadows(model, tokenizer, rows, tmp_path, steps=8, seed=0, progress=silent)
    ids = torch.arange(3, 13)[None]

    def logits(*drawn: Any) -> torch.Tensor:
        with torch.no_grad(), variant(model, *drawn):
            return model(input_ids=ids).logits

    base, whole, half = logits(""), logits("cheerful"), logits("cheerful", 0.5)
    assert 0 < float((half - base).norm()) < float((whole - base).norm())
    assert torch.equal(logits("cheerful"), whole)
    assert torch.equal(logits(""), base)


def unmoved(adapter: SafetyAdapter) -> Variant:
    config = adapter.config
    return Variant(
        fold_gate(adapter, Calibration.of_base(adapter)), Realignment.none(len(config.read_layers), config.hidden_size)
    )


def test_training_reads_a_shadow_as_attaching_would(tokenizer: Any) -> None:
    """The interventions' matrices and the gate, on a model that has drifted."""
    adapter = random_adapter(tiny(), tokenizer, anchors=ANCHORS)
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.add_(0.05 * torch.randn(32, 64))
    met, trained_on = calibrate_gate(model, adapter, tokenizer), realigned(adapter, model, tokenizer)
    parts: Any = adapter.interventions.values()
    for index, part in enumerate(parts):
        weight, bias = trained_on.realignment.fold(2 + index, part.down, part.bias)
        assert torch.equal(weight, met.down[index])
        assert torch.equal(bias, met.down_bias[index])
        assert not torch.allclose(weight, part.down, atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(trained_on.gate.weight, met.gate, strict=True))


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


def test_the_models_are_drawn_by_their_weights(tokenizer: Any) -> None:
    model = tiny().requires_grad_(False)
    adapter = random_adapter(model, tokenizer)
    drawn = (Drawn("", often=2.0), Drawn("cheerful"), Drawn("compliant", 0.5, 2.0), Drawn("terse"))
    gate = OpenGate(model, adapter, {one: unmoved(adapter) for one in drawn}, 2)
    assert [gate._drawn(share).shadow for share in (0.0, 0.33, 0.34, 0.49, 0.51, 0.83, 0.84, 0.999)] == [
        "", "", "cheerful", "cheerful", "compliant", "compliant", "terse", "terse",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("gate_layers: [2, 1]", "rise"), ("gate_layers: 2", "gate_layers is 2"), ("dtype: bf16", "dtype is bf16"),
        ("rank: 0", "rank is 0; it must be at least 1"), ("held_out: 1.0", "shares"), ("strength: 0", "above 0"),
        ("steps: many", "steps is 'many'"), ("intervention_layers: [1]", "below the gate"), ("rank: true", "rank is True"),
    ],
)  # fmt: skip
def test_a_recipe_is_checked_before_any_work(line: str, said: str, tmp_path: Path) -> None:
    key = line.split(":")[0]
    lines = {"model": "model: m", "gate_layers": "gate_layers: [2]", "intervention_layers": "intervention_layers: [2]"}
    (tmp_path / "r.yaml").write_text("\n".join({**lines, key: line}.values()))
    with pytest.raises(DataError, match=said):
        TrainingArguments.from_yaml(tmp_path / "r.yaml")


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


def test_a_teams_own_text_is_trained_on_beside_ours(tokenizer: Any, tmp_path: Path, little_text: None) -> None:
    mine = [
        {
            "category": "fraud",
            "harmful": f"Forge invoice number {i} of our supplier.",
            "twin": f"Find invoice number {i}.",
        }
        for i in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, mine)))
    (tmp_path / "ordinary.jsonl").write_text(json.dumps({"text": "When is my parcel due?"}))
    files = {"pairs_file": str(tmp_path / "pairs.jsonl"), "ordinary_file": str(tmp_path / "ordinary.jsonl")}
    base = saved("llama", tokenizer, tmp_path / "base")
    train(TrainingArguments(model=base, **{**SMALL, **files}), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "safegene's text and 41 rows that were added to it" in card
    with pytest.raises(DataError, match="other settings or other text"):
        train(TrainingArguments(model=base, **SMALL), tmp_path / "out")


def test_a_mix_with_an_evaluation_prompt_is_refused(
    tokenizer: Any, tmp_path: Path, little_text: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = data.pairs()[0][3].harmful
    monkeypatch.setattr(contamination, "shipped", lambda: contamination.digests([prompt]))
    with pytest.raises(DataError, match="evaluation prompts"):
        train(TrainingArguments(model=saved("llama", tokenizer, tmp_path / "b"), **SMALL), tmp_path / "out")


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


@pytest.mark.parametrize("name", CONFIGS)
def test_harmless_rows_are_compared_with_the_unadapted_model(name: str, tokenizer: Any) -> None:
    model = tiny(name).requires_grad_(False)
    adapter = random_adapter(model, tokenizer).requires_grad_(True)
    gate = OpenGate(model, adapter, {Drawn(""): unmoved(adapter)}, 2)
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 3, 4, 0], [5, 6, 9, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    given, harmless = torch.ones(3, 3, 1), torch.tensor([False, True, True])
    adapted, own = gate._hidden(ids, mask, 2, given, harmless)
    plain = model.get_decoder()(input_ids=ids, attention_mask=mask).last_hidden_state[:, 2:-1]
    torch.testing.assert_close(own, plain[harmless], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(adapted, plain, atol=1e-3)


def test_common_prefix_stops_before_the_first_difference_or_open_gate() -> None:
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 9, 4]])
    shut = torch.zeros_like(ids)
    assert common_prefix(ids, shut) == 2
    assert common_prefix(ids, torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]])) == 1
    assert common_prefix(ids[:1], shut[:1]) == 3


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


def test_what_reads_learns_slower_than_what_writes() -> None:
    adapter = random_adapter(tiny("llama"))
    writes, reads = optimiser(adapter, 1e-2).param_groups
    assert {id(p) for p in writes["params"]} == {id(part.up) for part in adapter.interventions.values()}
    assert len(writes["params"]) + len(reads["params"]) == len(list(adapter.interventions.parameters()))
    assert reads["lr"] < writes["lr"] == 1e-2


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


def test_features_of_other_rows_are_not_taken_for_these(tokenizer: Any, tmp_path: Path) -> None:
    pairs, kept = data.pairs(0, 1, 0.0)[0], tmp_path / "features.safetensors"
    rows = gate_rows(tokenizer, pairs[:2], [], {}, None)
    found = read(tiny(), (1, 2), rows, kept, tokenizer, lambda n: None)
    again = read(tiny(), (1, 2), rows, kept, tokenizer, lambda n: None)
    assert torch.equal(found.x, again.x)
    with pytest.raises(DataError, match="features of other text"):
        read(tiny(), (1, 2), gate_rows(tokenizer, pairs[2:4], [], {}, None), kept, tokenizer, lambda n: None)


@pytest.mark.parametrize(("there", "used"), [(0, 0), (1, 1), (4, 1)])
def test_no_copies_are_made_on_other_gpus(there: int, used: int) -> None:
    assert on_one_device(types.SimpleNamespace(n_gpu=there))._n_gpu == used


def test_every_process_has_batches_of_its_own(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = TrainingArguments(model="m", **SMALL)
    targets = Targets(
        tokenizer, data.pairs(0, 1, 0.0)[0][:40], ["Name a fish."], [("Name a fish.", "A trout.")], arguments
    )
    assert len(targets) == arguments.steps
    monkeypatch.setattr("safegene.training.targets.PartialState", lambda: types.SimpleNamespace(num_processes=4))
    assert len(targets) == 4 * arguments.steps


def test_only_what_can_learn_is_thawed() -> None:
    model = torch.nn.Module()
    model.codes = torch.nn.Parameter(
        torch.zeros(2, dtype=torch.uint8), requires_grad=False
    )  # as 4-bit weights are kept
    model.scale = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    thaw(model)
    assert [p.requires_grad for p in (model.codes, model.scale)] == [False, True]


def test_a_fine_tune_generates_as_fast_as_its_base(tokenizer: Any) -> None:
    model = tiny()
    assert model.config.use_cache
    tuned = finetune(model, tokenizer, [{"prompt": "hello", "answer": "world"}], None, steps=1)
    assert tuned.config.use_cache  # the Trainer turns it off while it trains
    assert all(p.requires_grad for p in tuned.parameters())  # a frozen output layer is copied once a row


def test_a_fine_tune_that_is_interrupted_leaves_the_model_as_it_was(
    tokenizer: Any,
) -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def progress(_stage: str, _total: int = 0) -> Any:
        def interrupt(_steps: int) -> None:
            raise KeyboardInterrupt

        return interrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(model, tokenizer, [{"prompt": "hello", "answer": "world"}], None, steps=3, progress=progress)
    assert model.config.use_cache
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
