"""Training from nothing to a saved adapter, on tiny random models of the recipes' architectures."""

from __future__ import annotations

import json
import os
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
from safegene.progress import silent
from safegene.realignment import Realignment
from safegene.refusals import REFUSAL_TOKENS
from safegene.training import contamination, data
from safegene.training.arguments import TrainingArguments
from safegene.training.finetune import finetune, on_one_device, thaw
from safegene.training.gate_fit import gate_rows, read
from safegene.training.open_gate import OpenGate, Variant, common_prefix, realigned
from safegene.training.shadows import Drawn, teach_shadows, variant
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


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_train_attach_and_go_on_after_a_kill(
    name: str, tokenizer: Any, tmp_path: Path, little_text: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A random model refuses nothing: any text passes for a refusal, no anchor for too long, and its residuals must be there then.
    monkeypatch.setattr("safegene.refusals._refuses", lambda *_: True)
    monkeypatch.setattr("safegene.refusals.PROMPT_TOKENS", 10_000)
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
    assert adapter.residuals.shape[1] > 0
    assert bool(adapter.residuals.abs().sum(-1).gt(0).all())
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


def test_what_reads_learns_slower_than_what_writes() -> None:
    adapter = random_adapter(tiny("llama"))
    writes, reads = optimiser(adapter, 1e-2).param_groups
    assert {id(p) for p in writes["params"]} == {id(part.up) for part in adapter.interventions.values()}
    assert len(writes["params"]) + len(reads["params"]) == len(list(adapter.interventions.parameters()))
    assert reads["lr"] < writes["lr"] == 1e-2


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
