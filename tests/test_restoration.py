"""Restoration: the map that is fitted, what the adapter remembers of its base, and a fine-tune led back there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from conftest import CONFIGS, random_adapter, tiny
from safegene.adapter import SafetyAdapter
from safegene.attach import Handle, attach, calibrate
from safegene.calibration import Calibration
from safegene.config import Anchor
from safegene.errors import CalibrationError
from safegene.features import end_of_turn
from safegene.refusals import REFUSAL_TOKENS, batch_of, checked, record, restorations
from safegene.restoration import RANK, Restoration

ANCHORS = tuple(
    [Anchor(f"how to hurt person {i}, badly", "harmful") for i in range(12)]
    + [Anchor(f"how to greet {i}", "twin") for i in range(6)]
    + [Anchor(f"what is {i} + 1", "ordinary", str(i + 1)) for i in range(6)]
)


def written(r: Restoration, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(torch.nn.functional.linear(x, r.lead), r.back, r.offset)


def test_a_map_of_its_rank_is_found() -> None:
    torch.manual_seed(0)
    x = torch.randn(800, 24) * torch.linspace(2, 0.5, 24)
    wanted = x @ torch.randn(24, RANK) @ torch.randn(RANK, 24) + torch.randn(24)
    found = Restoration.fit(x, wanted, torch.ones(800, dtype=torch.bool), 1.0)
    assert (found.lead.shape, found.back.shape, found.offset.shape) == ((RANK, 24), (24, RANK), (24,))
    assert float((written(found, x) - wanted).norm() / wanted.norm()) < 0.2  # what the ridge takes


def test_harmless_positions_are_left_alone() -> None:
    torch.manual_seed(0)
    harmful = torch.arange(300) < 200
    x = torch.randn(300, 24) + torch.where(harmful, 2.0, -2.0)[:, None]
    push = torch.randn(24) * 10
    got = written(Restoration.fit(x, torch.where(harmful[:, None], push, 0.0), harmful, 0.5), x)
    assert float((got[harmful].mean(0) - push).norm()) < 0.1 * float(push.norm())
    assert float(got[~harmful].mean(0).norm()) < 0.1 * float(push.norm())


def test_nan_ends_in_one_line() -> None:
    with pytest.raises(CalibrationError, match="NaN"):
        Restoration.fit(torch.full((9, 8), torch.nan), torch.zeros(9, 8), torch.ones(9, dtype=torch.bool), 1.0)


def remembering(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> SafetyAdapter:
    """An adapter whose gate is open everywhere, and whose base says one refusal."""
    monkeypatch.setattr("safegene.models.generate", lambda _m, _t, prompts, _n: ["I cannot help."] * len(prompts))
    adapter = random_adapter(model, tokenizer, threshold=-100.0, anchors=ANCHORS)
    adapter.config = replace(adapter.config, refusals=("I cannot",))
    handle = Handle(model, adapter, Calibration.of_base(adapter))
    record(handle, tokenizer)
    handle.detach()
    return adapter


def test_anchors_that_are_checked_take_no_part(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = remembering(tiny(), tokenizer, monkeypatch)
    anchors = adapter.config.anchors
    assert [a.refusal for a in anchors] == ["I cannot help."] * 12 + [""] * 12
    batch = batch_of(tokenizer, anchors)
    assert len(batch.ids) == 12 - len(checked(anchors)) + 6
    assert int(batch.harmful.sum()) == 9 * (REFUSAL_TOKENS + 1) == adapter.residuals.shape[1]
    assert int((~batch.harmful).sum()) == 6 + 3  # three of them are ordinary ones, with an answer of one token
    for text in (a.text for a in checked(anchors)):
        ids = end_of_turn(tokenizer, text)[0]
        assert not any(row[: len(ids)].tolist() == ids for row in batch.ids)
    first = batch.ids[0, int(batch.place[0]) + 1 :][:REFUSAL_TOKENS]
    assert tokenizer.decode(first) == "I cannot help."[:REFUSAL_TOKENS]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fine_tune_is_led_back_to_the_base(name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name)
    adapter = remembering(model, tokenizer, monkeypatch)

    def off(restored: bool) -> list[float]:
        """Distance from the base's residuals at the restored layers, over their size."""
        calibration = Calibration.of_base(adapter)
        handle = Handle(model, adapter, calibration)
        if restored:
            calibration = calibration.restored(restorations(handle, tokenizer, 0.5))
        handle.detach()
        handle = Handle(model, adapter, calibration)
        fresh = SafetyAdapter(adapter.config)
        fresh.interventions = adapter.interventions
        handle.adapter = fresh
        record(handle, tokenizer)
        handle.detach()
        return [
            float((now - then).float().norm() / then.float().norm())
            for now, then in zip(fresh.residuals, adapter.residuals, strict=True)
        ]

    assert max(off(False)) < 0.02
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    for without, restored in zip(off(False), off(True), strict=True):
        assert restored < 0.8 * without


def test_residuals_of_other_anchors_are_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    adapter = remembering(model, tokenizer, monkeypatch)
    adapter.config = replace(adapter.config, refused=0.9)
    adapter.residuals = adapter.residuals[:, :-1]
    with pytest.raises(CalibrationError, match="not those of its anchors"):
        attach(model, adapter, tokenizer=tokenizer, allow_drift=True)
    assert not model.model.layers[2]._forward_hooks


@pytest.mark.parametrize(
    ("shares", "weight", "outside"),
    [
        ((0.9,), 4.0, ""),
        ((0.45,), 4.0, ""),
        ((0.4, 0.5), 0.5, ""),
        ((0.4, 0.3), 4.0, ""),
        ((0.1, 0.2), 0.5, "Only 20 %"),
    ],
)
def test_the_lightest_that_is_enough(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, shares: tuple[float, ...], weight: float, outside: str
) -> None:
    model = tiny()
    adapter = remembering(model, tokenizer, monkeypatch)
    adapter.config = replace(adapter.config, refused=0.5)
    monkeypatch.setattr("safegene.refusals.CHECKED", 1)  # twelve: 0.42 is enough
    monkeypatch.setattr("safegene.calibration.MIN_SEPARATION", 0.0)
    left = iter(shares)
    monkeypatch.setattr("safegene.attach.refused", lambda *_: next(left))
    monkeypatch.setattr(
        "safegene.attach.restorations",
        lambda handle, _t, w: [Restoration(torch.full((RANK, 32), w), torch.zeros(32, RANK), torch.zeros(32))] * 2,
    )
    found = calibrate(model, adapter, tokenizer)
    assert found.report["harmless_weight"] == weight
    assert float(found.lead[0, 0, 0]) == weight
    assert found.outside.startswith(outside)
    assert next(left, None) is None
