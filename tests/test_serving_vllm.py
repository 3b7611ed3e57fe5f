"""The vLLM plugin without vLLM: its operators, and the checkpoint on disk. With vLLM: tests/vllm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import CONFIGS, random_adapter, tiny
from safegene import models
from safegene.adapter import SafetyAdapter
from safegene.attach import attach
from safegene.calibration import Calibration, fold_gate
from safegene.errors import AttachError, GateError
from safegene.serving.vllm import operator
from safegene.serving.vllm.protection import Protected, ProtectedLayer, Station, Watch
from safegene.serving.vllm.worker import Extension
from served import FAR

# The operators


def stations(adapter: SafetyAdapter, tokens: int) -> dict[int, Station]:
    """As `Protected` makes them, of an adapter with gate layers 1 and 2, interventions at 2 and 3, and restored at 3 and 4."""
    calibration = Calibration.of_base(adapter)
    gate = fold_gate(adapter, calibration)
    inner, g = torch.zeros(tokens, adapter.config.gate_width), torch.zeros(tokens, 1)
    turns = {layer: turn.to(torch.device("cpu")) for layer, turn in calibration.corrections(adapter).items()}
    return {
        1: Station(inner, g, gate._replace(weight=(gate.weight[0],)), True, False, None),
        2: Station(inner, g, gate._replace(weight=(gate.weight[1],)), False, True, turns[2]),
        3: Station(inner, g, None, False, False, turns[3]),
        4: Station(inner, g, None, False, False, turns[4]),
    }


class Layer(torch.nn.Module):
    """Of vLLM, as far as it is looked at."""


class OwnLayer(ProtectedLayer, Layer):
    pass


class Model(Protected):
    layer_class = OwnLayer

    def __init__(self, adapter: SafetyAdapter, layers: list[Any], end: int = 5) -> None:
        torch.nn.Module.__init__(self)
        self.armament: Any = SimpleNamespace(adapter=adapter, calibration=Calibration.of_base(adapter))
        self.model = SimpleNamespace(layers=layers, start_layer=0, end_layer=end)


def test_stations_stand_after_their_layers() -> None:
    layers: list[Any] = [Layer() for _ in range(5)]
    found = Model(random_adapter(tiny()), layers)._place(8, torch.device("cpu"))
    assert [type(layer) for layer in layers] == [Layer, OwnLayer, OwnLayer, OwnLayer, OwnLayer]
    assert [(s.reads, s.first, s.last, s.turns) for s in found] == [
        (True, True, False, False), (True, False, True, True), (False, False, False, True), (False, False, False, True)
    ]  # fmt: skip


def test_layers_that_would_go_past_their_station_are_refused() -> None:
    adapter, device = random_adapter(tiny()), torch.device("cpu")
    wrapped: list[Any] = [Layer() for _ in range(5)]
    wrapped[2].forward = lambda *_: None  # what offloading does
    with pytest.raises(AttachError, match="wrapped"):
        Model(adapter, wrapped)._place(8, device)
    with pytest.raises(AttachError, match="no protected form"):
        Model(adapter, [torch.nn.Identity() for _ in range(5)])._place(8, device)
    with pytest.raises(AttachError, match="one pipeline rank"):
        Model(adapter, [Layer() for _ in range(5)], end=2)._place(8, device)


@pytest.mark.parametrize("threshold", [-FAR, 0.0, FAR])
def test_the_operators_are_attach(threshold: float, ids: torch.Tensor) -> None:
    """A model run layer by layer, its stream in two parts as vLLM holds it, rows of all requests in one table."""
    model = tiny()
    adapter = random_adapter(model, threshold=threshold)
    places = stations(adapter, 64)
    half = torch.Generator().manual_seed(3)

    def hook(layer: int) -> Any:
        def split(_module: Any, _args: Any, output: Any) -> Any:
            stream = (output[0] if isinstance(output, tuple) else output).reshape(-1, 32)
            residual = stream * torch.rand(1, generator=half)
            hidden = stream - residual
            before = hidden.clone(), residual.clone()
            places[layer](hidden, residual)
            shut = places[layer].g[: len(hidden), 0] <= 0
            assert torch.equal(hidden[shut], before[0][shut])
            assert torch.equal(residual[shut], before[1][shut])
            changed = (hidden + residual).reshape(ids.shape[0], -1, 32)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return split

    hooks = [model.model.layers[layer].register_forward_hook(hook(layer)) for layer in places]
    with torch.no_grad():
        found = model(input_ids=ids).logits
        for h in hooks:
            h.remove()
        plain = model(input_ids=ids).logits
        handle = attach(model, adapter, calibration=replace(Calibration.of_base(adapter), checkpoint=models.weights_digest(model)))  # fmt: skip
        expected = model(input_ids=ids).logits
    assert (found - expected).abs().max() < 1e-4
    assert torch.equal(expected, plain) is (threshold == FAR)
    assert handle.status()["armed"]


def test_a_changed_row_is_the_cores_to_the_bit() -> None:
    """Also in bfloat16, where a difference added to one part of the stream would be rounded twice."""
    adapter = random_adapter(tiny(), threshold=-FAR)
    turn = stations(adapter, 8)[3]
    turn.g.fill_(1.0)
    hidden, residual = (torch.randn(8, 32, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (1, 2))
    part: Any = adapter.interventions["3"]
    expected = operator.intervene(hidden + residual, turn.g, part.correction(part.down, part.bias))
    assert not torch.equal(expected, hidden + residual)
    turn(hidden, residual)
    assert torch.equal(hidden + residual, expected)


def test_what_a_gpu_computes_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = random_adapter(tiny(), threshold=-FAR)
    place = stations(adapter, 6)[3]
    place.g[:, 0] = torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0, 0.0])
    one, other = ([torch.randn(6, 32, generator=torch.Generator().manual_seed(i)) for i in (1, 2)] for _ in range(2))
    place(*one)

    class Elsewhere(torch.Tensor):
        device = SimpleNamespace(type="cuda")  # type: ignore[assignment]

    buffers = (
        place.turn_down,
        place.turn_bias,
        place.turn_up,
        place.turn_wish,
        place.turn_wish_bias,
        place.turn_strength,
        place.turn_lead,
        place.turn_back,
        place.turn_offset,
    )
    operator.turn(other[0].as_subclass(Elsewhere), other[1], place.g, *buffers)  # type: ignore[arg-type]
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a, b.as_subclass(torch.Tensor), atol=1e-4)


def test_compiled_they_are_the_same() -> None:
    places = stations(random_adapter(tiny()), 16)

    def work(hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        hidden, residual = hidden * 1.5, residual + 1
        for place in places.values():
            place(hidden, residual)
        return hidden + residual

    compiled = torch.compile(work, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 11):
        given = [torch.randn(rows, 32, generator=torch.Generator().manual_seed(i)) for i in (rows, 2)]
        assert torch.allclose(compiled(*given), work(*given), atol=1e-4)


def test_more_rows_than_the_buffers_hold_are_an_error() -> None:
    place = stations(random_adapter(tiny()), 4)[1]
    with pytest.raises(RuntimeError):
        place(torch.randn(5, 32), torch.randn(5, 32))


def test_nan_opens_the_gate_and_stops_the_engine() -> None:
    places = stations(random_adapter(tiny(), threshold=FAR), 4)
    hidden, residual = torch.randn(4, 32), torch.randn(4, 32)
    hidden[2, 5] = float("nan")
    for place in places.values():
        place(hidden, residual)
    assert places[2].g[:, 0].tolist() == [0.0, 0.0, 1.0, 0.0]
    watch = Watch(torch.device("cpu"))
    watch.look(torch.randn(2, 32))
    with pytest.raises(GateError, match="NaN"):
        watch.look(hidden)
    with pytest.raises(GateError, match="NaN"):  # it stays so
        watch.look(torch.randn(2, 32))


def test_the_gate_is_switched_off_before_the_proof_only() -> None:
    places = stations(random_adapter(tiny(), threshold=-FAR), 4)

    class Model:
        stations, sealed, accepted = list(places.values()), False, True
        armament = SimpleNamespace(digest="ab", adapter=random_adapter(tiny()))

    class Worker(Extension):
        def get_model(self) -> Any:
            return Model

    def opened() -> float:
        for place in places.values():
            place(torch.ones(2, 32), torch.ones(2, 32))
        return float(places[2].g[:2].sum())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safegene.serving.vllm.worker.Protected", type)
        worker = Worker()
        assert opened() == 2
        worker.safegene_shut()
        worker.safegene_shut()  # twice is once
        assert opened() == 0
        with pytest.raises(AttachError, match="switched off"):
            worker.safegene_status()
        worker.safegene_arm(True)
        assert opened() == 2
        assert worker.safegene_status() == {"armament": "ab", "accepted": True, "stations": 5}
        with pytest.raises(GateError, match="stays armed"):
            worker.safegene_shut()
    with pytest.raises(AttachError, match="no adapter inside"):
        worker.safegene_status()


# The checkpoint on disk


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_files_have_the_loaded_models_digest(name: str, tied: bool, tmp_path: Path) -> None:
    config = CONFIGS[name]()
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model: Any = models_from(config)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model*.safetensors"))) > 1
    for dtype in (torch.float32, torch.bfloat16):
        loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
        assert models.checkpoint_digest(tmp_path, dtype) == models.weights_digest(loaded)
    assert models.checkpoint_digest(tmp_path, torch.float32) != models.checkpoint_digest(tmp_path, torch.bfloat16)


def models_from(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config).eval().float()


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(models.ModelNotFoundError, match="cannot be read"):
        models.checkpoint_digest(tmp_path, torch.float32)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(models.ModelNotFoundError, match=r"holds no model\*"):
        models.checkpoint_digest(tmp_path, torch.float32)
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(models.ModelNotFoundError, match="cannot be read"):
        models.checkpoint_digest(tmp_path, torch.float32)
