"""Ways in which protection could be lost in silence: each must be seen, or must not matter."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from conftest import random_adapter, tiny
from safegene.attach import attach
from safegene.calibration import Calibration, calibrate_gate
from safegene.config import Anchor
from safegene.errors import AdapterFileError, AttachError, CalibrationError, UncalibratedWarning
from safegene.models import unwrap

ANCHORS = tuple(Anchor(f"{label} {i} of them", label) for label in ("harmful", "ordinary") for i in range(4))  # type: ignore[arg-type]


def drifted() -> Any:
    """A fine-tune, in weights that differ a little from the base's."""
    model = tiny()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * weight.std() * torch.randn_like(weight)
    return model


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_model_compiled_before_attach_is_protected() -> None:
    model, ids = tiny(), torch.arange(3, 13)[None]
    adapter = random_adapter(model, threshold=-1e3)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(input_ids=ids).logits
        handle = attach(model, adapter)
        adapted = compiled(input_ids=ids).logits
        assert not torch.allclose(adapted, plain, atol=1e-3)
        torch.testing.assert_close(adapted, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
        handle.detach()
        torch.testing.assert_close(compiled(input_ids=ids).logits, plain, atol=1e-5, rtol=1e-5)


def test_another_model_without_calibration_is_warned_of() -> None:
    base = tiny()
    adapter = random_adapter(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(base, adapter).detach()
        attach(tiny().to(torch.bfloat16), adapter).detach()  # the base in another precision is the base
    with pytest.warns(UncalibratedWarning, match="pass tokenizer="):
        attach(drifted(), adapter)


def test_calibration_reads_the_model_as_it_serves(tokenizer: Any) -> None:
    base = tiny()
    adapter = random_adapter(base, tokenizer, anchors=ANCHORS)
    expected = calibrate_gate(base, adapter, tokenizer)
    lora = get_peft_model(tiny(), LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"]))
    lora.train()
    lora.get_base_model().gradient_checkpointing_enable()
    found = calibrate_gate(lora, adapter, tokenizer)
    torch.testing.assert_close(found.gate, expected.gate, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.down, expected.down, atol=1e-4, rtol=1e-4)
    assert lora.training


def test_a_part_that_is_offloaded_is_refused_before_any_hook() -> None:
    model = tiny()
    adapter = random_adapter(model)
    model.model.layers[1].mlp.to("meta")  # where accelerate leaves what it keeps on disk
    with pytest.raises(AttachError, match="offloaded"):
        attach(model, adapter)


def test_a_lora_added_after_attach_stops_the_call() -> None:
    model, ids = tiny(), torch.arange(3, 13)[None]
    handle = attach(model, random_adapter(model))
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AttachError, match="changed after attach"), torch.no_grad():
        lora(input_ids=ids)
    with torch.no_grad(), handle.disabled():  # without protection nothing is promised, so nothing is refused
        lora(input_ids=ids)
    handle.detach()


def test_attach_to_the_model_inside_a_peft_model() -> None:
    base, ids = tiny(), torch.arange(3, 13)[None]
    adapter = random_adapter(base, threshold=-1e3)
    lora = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        plain = lora(input_ids=ids).logits
        handle = attach(unwrap(lora), adapter)
        assert not torch.allclose(lora(input_ids=ids).logits, plain, atol=1e-3)
    handle.detach()


@pytest.mark.parametrize(
    "changed",
    [
        {"threshold": float("inf")}, {"threshold": float("nan")}, {"ramp": float("nan")}, {"ramp": 0.0}, {"strength": 0.0},
        {"strength": float("inf")}, {"refused": float("nan")}, {"hidden_size": "32"}, {"rank": 0}, {"gate_layers": (2, 1)},
        {"intervention_layers": (3, 3)}, {"threshold": "low"},
    ],
)  # fmt: skip
def test_a_config_that_could_not_protect_is_refused(changed: dict[str, Any]) -> None:
    config = random_adapter(tiny()).config
    with pytest.raises(AdapterFileError):
        dataclasses.replace(config, **changed)


@pytest.mark.parametrize("changed", [{"threshold": float("inf")}, {"ramp": float("nan")}, {"strength": 0.0}])
def test_a_calibration_that_could_not_protect_is_refused(changed: dict[str, float], tmp_path: Path) -> None:
    found = dataclasses.replace(Calibration.of_base(random_adapter(tiny())), **changed)
    found.save(tmp_path / "c.safetensors")
    with pytest.raises(CalibrationError, match="calibration file"):
        Calibration.load(tmp_path / "c.safetensors")


def test_settings_that_were_changed_after_training_are_refused(tmp_path: Path) -> None:
    from safegene.adapter import SafetyAdapter

    random_adapter(tiny()).save_pretrained(tmp_path)
    path = tmp_path / "safegene_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "threshold": 1e9}))
    with pytest.raises(AdapterFileError, match="settings"):
        SafetyAdapter.from_pretrained(tmp_path)
    path.write_text(json.dumps({**said, "threshold": int(said["threshold"])}))  # the same number, written otherwise
    SafetyAdapter.from_pretrained(tmp_path)


def test_a_model_that_was_moved_takes_the_adapter_along() -> None:
    model, ids = tiny(), torch.arange(3, 13)[None]
    handle = attach(model, random_adapter(model, threshold=-1e3))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        here = handle._on
        handle._on = [torch.device("meta")] * len(here)  # as if it had been armed elsewhere
        handle._weights = {}
        assert torch.equal(model(input_ids=ids).logits, before)
    assert handle._on == here
