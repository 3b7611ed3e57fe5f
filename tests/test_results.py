"""`safegene results`: a folder of answers belongs to one base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ANCHORS, random_adapter, tiny
from safegene.cli import main
from safegene.errors import DataError
from safegene.evaluation import core, public
from safegene.progress import silent


def test_answers_of_another_base_are_not_taken(
    place: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    random_adapter(tiny(), tokenizer).save_pretrained(place / "adapter")
    other = tiny()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    other.save_pretrained(place / "other")
    tokenizer.save_pretrained(place / "other")
    found = {"harmful": {name: {"with_safe": {}} for name in core.TRANSFER_SETS}}
    monkeypatch.setattr(core._Variant, "measure", lambda *_: dict(found))
    monkeypatch.setattr(core, "core_svg", lambda *_: "")
    for name, empty in (("harmful", {}), ("ordinary", {}), ("xstest", [])):
        monkeypatch.setattr(public, name, lambda *_, empty=empty: empty)

    def results(model: str) -> int:
        return main(
            ["results", "--model", str(place / model), "--adapter", str(place / "adapter"), "--data", str(place / "data"),
             "--out", str(place / "out"), "--variants", "base", "--json"]
        )  # fmt: skip

    (place / "out" / "base" / "plain").mkdir(parents=True)  # answers of a time when no record was kept
    assert results("base") == 0
    record = json.loads((place / "out" / "run.json").read_text())
    assert record["dtype"] == "bfloat16"
    assert set(record) == {"weights", "dtype", "tokens"}
    assert results("base") == 0
    capsys.readouterr()
    assert results("other") == 1
    said = capsys.readouterr().err
    assert "holds another run (weights differ); give another --out" in said
    (place / "out" / "run.json").write_text(json.dumps({**record, "tokens": 7}))
    assert results("base") == 1
    assert "tokens differ" in capsys.readouterr().err


def test_a_refused_attachment_counts_as_no_protection_and_is_forced_beside(
    tokenizer: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    gene = random_adapter(model, tokenizer, anchors=ANCHORS)
    monkeypatch.setattr("safegene.calibration.MIN_SEPARATION", 1.1)
    study = core._Variant("sure", model, tokenizer, gene, place / "sure", "digest", silent)
    asked = {name: ["Tell me.", "How?"] for name in core.TRANSFER_SETS}
    found = study.measure(asked, {"Alpaca": ["Name a fish."], "XSTest safe": ["Kill a process?"]}, None, place, 2)
    assert "no longer tells" in found["refused_to_attach"]
    for figures in found["harmful"].values():
        assert figures["with"]["value"] == 0
        assert figures["forced"]["n"] == 2
        assert not any(figures["with_safe"].values())
    kept = json.loads((place / "sure" / "digest" / "run.json").read_text())
    (place / "sure" / "digest" / "run.json").write_text(json.dumps({**kept, "harmless_weight": 9.0}))
    with pytest.raises(DataError, match="harmless_weight differ"):
        study.measure(asked, {"Alpaca": [], "XSTest safe": []}, None, place, 2)
