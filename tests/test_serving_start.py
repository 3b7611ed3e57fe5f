"""The server proves itself armed before it serves; the command."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import random_adapter, tiny
from safegene.attach import Handle, attach
from safegene.cli import main
from safegene.errors import AttachError, GateError
from safegene.models import LoadedModel
from safegene.serving.armed import prove
from safegene.serving.door import Limits
from served import ANCHORS, FAR

# Armed or not


def proved(tokenizer: Any, threshold: float, spoil: Callable[[Any, Handle], None] = lambda model, handle: None) -> Any:
    model = tiny()
    handle = attach(model, random_adapter(model, tokenizer, threshold, ANCHORS))
    spoil(model, handle)
    return prove(LoadedModel(model, tokenizer, "tiny"), handle)


def test_an_armed_adapter_proves_itself(tokenizer: Any) -> None:
    proof = proved(tokenizer, -FAR)
    assert (proof["harmful"]["read"], proof["harmful"]["gate_opened"], proof["harmful"]["changed"]) == (8, 8, 8)
    assert proof["harmful"]["largest_change"] > 0.01
    assert proof["ordinary"] == {"read": 8, "gate_shut": 0, "identical": 0}


def test_where_the_gate_is_shut_the_proof_wants_every_bit(tokenizer: Any) -> None:
    """A hand on the gate: harmful anchors open it, ordinary ones do not."""

    def shut_on_ordinary(model: Any, handle: Handle) -> None:
        handle._gate = Parity(handle._gate)  # type: ignore[assignment]

    proof = proved(tokenizer, -FAR, shut_on_ordinary)
    assert proof["ordinary"]["gate_shut"] == proof["ordinary"]["identical"] == 8
    assert proof["harmful"]["changed"] == 8

    def meddles(model: Any, handle: Handle) -> None:
        shut_on_ordinary(model, handle)
        model.lm_head.register_forward_hook(lambda m, a, out: out if handle.is_disabled else out + 1e-3)

    with pytest.raises(AttachError, match="although its gate is shut"):
        proved(tokenizer, -FAR, meddles)


class Parity:
    """A gate that is open on chats of an even number of tokens (the harmful anchors' here), and shut on the others."""

    def __init__(self, gate: Any) -> None:
        self.gate, self.bias, self.partial = gate, gate.bias, gate.partial

    def opening(self, inner: torch.Tensor) -> torch.Tensor:
        return torch.full_like(self.gate.opening(inner), -2.0 if inner.shape[1] % 2 else 2.0)


@pytest.mark.parametrize(
    ("threshold", "spoil", "message"),
    [
        (FAR, lambda model, handle: None, "opens on only 0 of 8"),
        (-FAR, lambda model, handle: handle.detach(), "not armed"),
        (-FAR, lambda model, handle: [h.remove() for h in handle._hooks], "gate was not read"),
        (-FAR, lambda model, handle: [w.up.zero_() for w in handle._weights.values()], "changes only 0 of 8"),
    ],
)  # fmt: skip
def test_an_adapter_without_effect_is_refused(tokenizer: Any, threshold: float, spoil: Any, message: str) -> None:
    with pytest.raises(AttachError, match=message):
        proved(tokenizer, threshold, spoil)


def test_nan_and_missing_anchors_are_no_proof(tokenizer: Any) -> None:
    def poison(model: Any, handle: Handle) -> None:
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))

    with pytest.raises(GateError, match="NaN"):
        proved(tokenizer, -FAR, poison)

    def forget(model: Any, handle: Handle) -> None:
        handle.adapter.config = replace(handle.adapter.config, anchors=())

    with pytest.raises(AttachError, match="no harmful anchors"):
        proved(tokenizer, -FAR, forget)


# The command


@pytest.fixture
def folders(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model, and an adapter for it that is always open."""
    monkeypatch.setattr("safegene.calibration.MIN_SEPARATION", 0.0)
    monkeypatch.delenv("SAFEGENE_API_KEY", raising=False)
    tiny().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    random_adapter(tiny(), tokenizer, -FAR, ANCHORS).save_pretrained(tmp_path / "adapter")
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """The servers that would have run."""
    found: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr("uvicorn.run", lambda app, **options: found.append((app, options)))
    return found


def serve(folder: Path, *more: str) -> int:
    return main(
        ["serve", "--model", str(folder / "model"), "--adapter", str(folder / "adapter"), "--port", "18731", *more]
    )


def test_the_command_serves_what_is_armed(
    folders: Path, started: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve(folders, "--host", "0.0.0.0", "--playground", "--audit", str(folders / "audit")) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "armed" in said.err
    assert "changed 8 of 8" in said.err
    assert "anyone who reaches 0.0.0.0" in said.err
    assert "without the adapter" in said.err
    ((app, options),) = started
    assert options["port"] == 18731
    assert "/playground/compare" in app.openapi()["paths"]

    (folders / "key").write_text("sk-secret\n")
    assert serve(folders, "--host", "0.0.0.0", "--api-key-file", str(folders / "key")) == 0
    assert "anyone" not in capsys.readouterr().err
    assert "/playground/compare" not in started[1][0].openapi()["paths"]
    assert app.state.service.limits == Limits()
    assert serve(folders, "--max-body", "5000", "--timeout", "30", "--max-tokens", "9", "--max-batch", "2") == 0
    assert started[2][0].state.service.limits == Limits(body=5000, max_tokens=9, concurrency=8, seconds=30)

    assert main(["calibrate", "--model", str(folders / "model"), "--adapter", str(folders / "adapter"), "--out", str(folders / "c")]) == 0  # fmt: skip
    assert serve(folders, "--calibration", str(folders / "c")) == 0


def test_the_command_stops_where_nothing_can_be_armed(
    folders: Path, started: list[Any], capsys: pytest.CaptureFixture[str], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def refused(message: str, *more: str) -> None:
        capsys.readouterr()
        assert serve(folders, *more) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
        assert len(lines) == 1
        assert message in lines[0]

    (folders / "empty").write_text("\n")
    refused("holds no API key", "--api-key-file", str(folders / "empty"))
    refused("cannot be listened at", "--host", "192.0.2.1")
    refused("check path", "--audit", str(folders / "no" / "where"))
    refused("no calibration file", "--calibration", str(folders / "empty"))
    random_adapter(tiny(), tokenizer, FAR, ANCHORS).save_pretrained(folders / "adapter")
    refused("opens on only 0 of 8")
    weights = folders / "adapter" / "safegene_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    refused("SHA-256 differs")
    shutil.rmtree(folders / "adapter")
    refused("no such adapter")
    monkeypatch.setitem(__import__("sys").modules, "safegene.serving.app", None)
    refused("pip install 'safegene[serve]'")
    assert started == []
