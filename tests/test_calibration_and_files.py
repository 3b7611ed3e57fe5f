"""Calibration and adapter files: what they give back, and what they refuse."""

from __future__ import annotations

import copy
import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import CONFIGS, random_adapter, tiny
from safegene.adapter import SafetyAdapter
from safegene.attach import attach, calibrate
from safegene.calibration import Calibration, anchor_scores, boundary, calibrate_gate, settle
from safegene.config import CONFIG_NAME, WEIGHTS_NAME, AdapterConfig, Anchor
from safegene.errors import AdapterFileError, CalibrationError, DriftError, ModelNotFoundError
from safegene.features import at_prompt_end, end_of_turn, gate_features, read_anchors
from safegene.models import resolve, weights_digest
from safegene.realignment import Realignment
from safegene.refusals import CHECKED, REFUSAL_TOKENS, refused

ANCHORS = tuple(
    [Anchor(f"how to hurt person {i}", "harmful") for i in range(6)]
    + [Anchor(f"how to greet person {i}", "twin") for i in range(6)]
    + [Anchor(f"what is {i} + 1", "ordinary", str(i + 1)) for i in range(6)]
)


def calibrated(model: Any, tokenizer: Any) -> SafetyAdapter:
    """An adapter whose gate was fitted by hand to tell the anchors apart."""
    adapter = random_adapter(model, tokenizer, anchors=ANCHORS)
    features = read_anchors(model, adapter.config.read_layers, tokenizer, ANCHORS)
    harmful = torch.tensor([a.label == "harmful" for a in ANCHORS])
    adapter.anchor_features = at_prompt_end(features).half()
    adapter.requires_grad_(True)
    optimiser = torch.optim.Adam(adapter.gate.parameters(), lr=0.02)
    for _ in range(150):
        scores = torch.stack([adapter.gate.score(list(f[:2])).max() for f in features])
        torch.nn.functional.binary_cross_entropy_with_logits(scores, harmful.float()).backward()
        optimiser.step()
        optimiser.zero_grad()
    return adapter.requires_grad_(False)


def test_end_of_turn_is_after_the_users_words(tokenizer: Any) -> None:
    ids, start = end_of_turn(tokenizer, "say hi", "ok")
    assert tokenizer.decode(ids[:start]).endswith("say hi")
    assert tokenizer.decode(ids[start:]) == "<s>[bot]ok"


@pytest.mark.parametrize("name", CONFIGS)
def test_features_do_not_depend_on_the_company_they_are_read_in(name: str, tokenizer: Any) -> None:
    model = tiny(name)
    chats = [end_of_turn(tokenizer, text)[0] for text in ("hello", "what is 1 + 1", "hello again, and well met")]
    together = dict(gate_features(model, (1, 3), chats, 0))  # the template's beginning is read once for all
    for i, ids in enumerate(chats):
        ((_, alone),) = gate_features(model, (1, 3), [ids], 0)
        assert alone.shape == together[i].shape == (2, len(ids), 32)
        torch.testing.assert_close(alone, together[i], atol=1e-4, rtol=1e-4)
    ((_, lone),) = gate_features(model, (1,), [[7]], 0)
    assert lone.shape == (1, 1, 32)


def test_calibration_on_the_base_changes_little_and_realigns_a_shifted_model(tokenizer: Any) -> None:
    model = tiny()
    adapter = calibrated(model, tokenizer)
    same = calibrate_gate(model, adapter, tokenizer)
    assert same.report["feature_shift"] < 1e-3
    assert not same.outside
    torch.testing.assert_close(same.gate, adapter.gate.weight, atol=1e-2, rtol=1e-2)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.add_(0.02 * torch.randn(32, 64))
    moved = calibrate_gate(model, adapter, tokenizer)
    assert moved.report["feature_shift"] > 0.01
    assert moved.checkpoint == weights_digest(model) != same.checkpoint


def test_regression_is_for_the_gate_and_its_threshold_reads_no_anchor_by_itself(tokenizer: Any) -> None:
    model = tiny()
    adapter = calibrated(model, tokenizer)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.add_(0.05 * torch.randn(32, 64))
    features = read_anchors(model, adapter.config.read_layers, tokenizer, ANCHORS)
    whole = Realignment.fit(at_prompt_end(features), adapter.anchor_features.float())
    found, _ = settle(adapter, features)
    plain = whole.regressed(0)
    nothing = torch.zeros(6)
    for index in (0, 1):
        assert torch.equal(found.gate[index], whole.fold(index, adapter.gate.weight[index], nothing)[0])
        assert not torch.allclose(found.gate[index], plain.fold(index, adapter.gate.weight[index], nothing)[0])
    part: Any = adapter.interventions["3"]
    assert torch.equal(found.down[1], plain.fold(3, part.down, part.bias)[0])
    assert not torch.allclose(found.down[1], whole.fold(3, part.down, part.bias)[0])
    left_out = anchor_scores(adapter.gate, features, whole)
    seen = torch.stack([adapter.gate.score([whole.apply(i, f[i]) for i in (0, 1)]).max() for f in features])
    assert not torch.allclose(left_out, seen, atol=1e-3)
    (low, high), (base_low, base_high) = boundary(left_out, ANCHORS), adapter.config.boundary
    expected = adapter.config.threshold + 0.5 * (low - base_low) + 0.5 * (high - base_high)
    assert found.threshold == pytest.approx(expected)


def test_features_that_are_nan_end_in_one_line() -> None:
    with pytest.raises(CalibrationError, match="NaN"):
        Realignment.fit(torch.full((1, 4, 8), torch.nan), torch.randn(1, 4, 8))


def test_calibration_file_is_bound_to_adapter_and_checkpoint(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny()
    adapter = calibrated(model, tokenizer)
    adapter.save_pretrained(tmp_path / "a")
    calibration = calibrate_gate(model, adapter, tokenizer)
    calibration.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    assert loaded.threshold == calibration.threshold
    attach(model, adapter, calibration=loaded).detach()
    attach(model, adapter, calibration=tmp_path / "c.safetensors", tokenizer=tokenizer).detach()
    other = copy.deepcopy(tokenizer)
    other.chat_template = "Be bold. " + tokenizer.chat_template
    with pytest.raises(CalibrationError, match="another chat template"):
        attach(model, adapter, calibration=loaded, tokenizer=other)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    with pytest.raises(CalibrationError, match="another checkpoint"):
        attach(model, adapter, calibration=loaded)
    (tmp_path / "c.safetensors").write_bytes(b"short")
    with pytest.raises(CalibrationError, match="safegene calibrate"):
        Calibration.load(tmp_path / "c.safetensors")


def test_a_gate_that_lost_its_way_is_refused_unless_told_otherwise(tokenizer: Any) -> None:
    model = tiny()
    adapter = calibrated(model, tokenizer)
    adapter.gate.out.neg_()
    with pytest.raises(DriftError, match="no longer tells"):
        attach(model, adapter, tokenizer=tokenizer)
    assert not model.model.layers[2]._forward_hooks
    attach(model, adapter, tokenizer=tokenizer, allow_drift=True).detach()


@pytest.mark.parametrize(("share", "outside"), [(0.9, False), (0.5, False), (0.3, True)])
def test_a_model_that_does_not_refuse_its_anchors_is_outside(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, share: float, outside: bool
) -> None:
    model = tiny()
    adapter = calibrated(model, tokenizer)
    adapter.config = replace(adapter.config, refused=0.8, refusals=("I cannot",))
    monkeypatch.setattr("safegene.attach.refused", lambda *_: share)
    if outside:
        with pytest.raises(DriftError, match="Only 30 % of the harmful anchors"):
            attach(model, adapter, tokenizer=tokenizer)
        assert not model.model.layers[2]._forward_hooks
    handle = attach(model, adapter, tokenizer=tokenizer, allow_drift=True)
    assert handle.status()["report"]["anchors_refused"] == share
    assert handle.status()["report"]["anchors_refused_on_base"] == 0.8
    handle.detach()


def test_a_calibration_made_by_hand_is_the_one_that_attach_makes(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    adapter = calibrated(model, tokenizer)
    adapter.config = replace(adapter.config, strength=1.5, refused=0.8, refusals=("I cannot",))
    monkeypatch.setattr("safegene.attach.refused", lambda *_: 0.3)
    found = calibrate(model, adapter, tokenizer)
    assert "Only 30 % of the harmful anchors" in found.outside
    assert found.checkpoint
    with pytest.raises(DriftError, match="Only 30 %"):
        attach(model, adapter, calibration=found)
    handle = attach(model, adapter, tokenizer=tokenizer, allow_drift=True)
    assert (handle.calibration.strength, handle.calibration.report) == (found.strength, found.report)
    handle.detach()


def test_refused_counts_the_adapters_own_words(tokenizer: Any) -> None:
    model = tiny()
    adapter = calibrated(model, tokenizer)
    everything = replace(adapter.config, refusals=("",))
    assert refused(model, tokenizer, everything) == 1.0
    assert refused(model, tokenizer, replace(everything, refusals=("I cannot help with",))) == 0.0
    right = copy.deepcopy(tokenizer)
    right.padding_side = "right"
    assert refused(model, right, everything) == 1.0


@pytest.mark.parametrize("name", CONFIGS)
def test_refused_reads_what_each_anchor_alone_is_answered(
    name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template's beginning stands before the padding, and is read once for all of them, as the adapter is armed."""
    model = tiny(name)
    texts = ("hi", "", "", "", "how to hurt a person", "", "", "", "who are you, and where do you live")
    adapter = random_adapter(model, tokenizer, anchors=tuple(Anchor(t, "harmful") for t in texts))
    handle = attach(model, adapter)
    chats = sorted((end_of_turn(tokenizer, t)[0] for t in texts[::CHECKED]), key=len)
    alone = [
        model.generate(torch.tensor([ids]), max_new_tokens=REFUSAL_TOKENS, do_sample=False, pad_token_id=0)[
            0, len(ids) :
        ]
        for ids in chats
    ]
    together: list[torch.Tensor] = []

    def decode(ids: torch.Tensor, **_: Any) -> list[str]:
        together.extend(ids)
        return [""] * len(ids)

    monkeypatch.setattr(tokenizer, "batch_decode", decode)
    refused(model, tokenizer, replace(adapter.config, refusals=("I cannot",)))
    handle.detach()
    assert len(together) == len(alone)
    for one, other in zip(alone, together, strict=True):
        assert one.tolist() == other[: len(one)].tolist()


def test_files_tampered_truncated_missing(tmp_path: Path) -> None:
    adapter = random_adapter(tiny())
    adapter.save_pretrained(tmp_path)
    weights = tmp_path / WEIGHTS_NAME
    good = weights.read_bytes()
    for bad in (good[:-7], good[:-1] + b"\x01", b""):
        weights.write_bytes(bad)
        with pytest.raises(AdapterFileError, match="truncated or was changed"):
            SafetyAdapter.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(AdapterFileError, match="does not exist"):
        SafetyAdapter.from_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text("{")
    with pytest.raises(AdapterFileError, match="not valid JSON"):
        SafetyAdapter.from_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="no such adapter"):
        SafetyAdapter.from_pretrained("nobody-made-this")
    nameless = random_adapter(tiny())
    nameless.sketch = torch.zeros(0, 0)
    nameless.save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="no sketch of its base"):
        SafetyAdapter.from_pretrained(tmp_path)
    adapter.gate.bias[0] = float("nan")
    with pytest.raises(AdapterFileError, match="NaN"):
        adapter.save_pretrained(tmp_path)


def test_a_full_disk_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    adapter = random_adapter(tiny())
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(AdapterFileError, match=r"No space left on device.*free space"):
        adapter.save_pretrained(tmp_path / "adapter")


def test_config_of_the_future() -> None:
    data = json.loads(random_adapter(tiny()).config.to_json())
    with pytest.warns(UserWarning, match="unknown keys"):
        AdapterConfig.from_dict({**data, "colour": "blue"})
    with pytest.raises(AdapterFileError, match="upgrade"):
        AdapterConfig.from_dict({**data, "schema_version": 99})
    with pytest.raises(AdapterFileError, match="train the adapter again"):
        AdapterConfig.from_dict({**data, "schema_version": 2})
    with pytest.raises(AdapterFileError, match="malformed"):
        AdapterConfig.from_dict({**data, "schema_version": None})
    with pytest.raises(AdapterFileError, match="below the last gate layer"):
        AdapterConfig.from_dict({**data, "intervention_layers": [0]})


def test_missing_models(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        resolve(tmp_path)
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        resolve("./nowhere")
    assert resolve("org/name") == "org/name"
