"""What the adapter costs: passes timed in pairs, models without weights of their own, and the command that says it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import ANCHORS, random_adapter, tiny
from safegene.attach import attach
from safegene.cli import main
from safegene.errors import SafegeneError
from safegene.evaluation import overhead, shapes
from safegene.evaluation.shapes import SHAPES, Shape

TINY = Shape(32, 64, 5, 4, (1, 2), (2, 3), key_value_heads=2, vocabulary=300)
ROOT = Path(__file__).parent.parent


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny shape called 8b, few tokens, and a compiler that only traces."""
    monkeypatch.setitem(SHAPES, "8b", TINY)
    monkeypatch.setattr(shapes, "RESERVE", 0)
    sizes = (("prefill", 1, 5), ("decode", 2, 4), ("first token", 1, 6))
    monkeypatch.setattr(overhead, "ALL_SIZES", sizes)
    monkeypatch.setattr(overhead, "LARGEST", ("decode", 2, 4))
    monkeypatch.setattr(overhead, "costs", functools.partial(overhead.costs, pairs=3))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("mode", ["eager", "compile"])
@pytest.mark.parametrize("kind", ["prefill", "decode", "first token"])
@pytest.mark.usefixtures("little")
def test_every_pass_is_the_same_one(kind: Any, mode: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the adapter in turn, each on what a prefill of the same tokens gives: no cache grows."""
    model = tiny()
    handle = attach(model, random_adapter(model, threshold=-1e3))
    with torch.no_grad():
        with_ = model(input_ids=ids).logits[:, -1]
        longer = model(input_ids=torch.cat([ids, ids[:, :1]], 1)).logits[:, -1]
        with handle.disabled():
            without = model(input_ids=ids).logits[:, -1]
    seen: list[torch.Tensor] = []
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: seen.append(head(hidden)) or seen[-1])
    if mode == "compile":
        monkeypatch.setattr(overhead, "_compiled", lambda m, mode: (lambda **inputs: m(**inputs),) * 2)
    found = overhead.overhead(model, handle, ids, kind, pairs=4, mode=mode)
    assert (found.n, found.open) == (4, 1.0)
    assert found.low <= found.value <= found.high
    assert min(found.seconds, found.seconds_without) > 0
    passes = [logits[:, -1] for logits in seen][-8:]
    want = longer if kind == "decode" else with_
    on = [torch.allclose(p, want, atol=1e-4, rtol=1e-3) for p in passes]
    assert sum(on) == 4
    if kind != "decode":  # there the step without the adapter reads a cache that was filled with it
        assert all(
            torch.allclose(p, without, atol=1e-4, rtol=1e-3) for p, is_on in zip(passes, on, strict=True) if not is_on
        )
    assert all(first != second for first, second in zip(on[::2], on[1::2], strict=True))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.usefixtures("little")
def test_a_compiled_model_is_timed_with_and_without(ids: torch.Tensor) -> None:
    model = tiny()
    handle = attach(model, random_adapter(model, threshold=-1e3))
    adapted, plain = overhead._compiled(model, "compile")
    with torch.no_grad():
        want = model(input_ids=ids).logits
        torch.testing.assert_close(adapted(input_ids=ids).logits, want, atol=1e-4, rtol=1e-3)
        with handle.disabled():
            assert not torch.allclose(plain(input_ids=ids).logits, want, atol=1e-2)
            torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-3)


def test_shapes_are_those_of_the_recipes() -> None:
    for name, shape in SHAPES.items():
        recipe = yaml.safe_load((ROOT / "recipes" / f"llama-3-{name}.yaml").read_text())
        for key in ("gate_layers", "intervention_layers", "gate_width", "rank"):
            made = getattr(shape, key)
            assert (list(made) if isinstance(made, tuple) else made) == recipe[key]
    billions = [(shapes.needed(shape, 0, 0) - shapes.RESERVE) / 2e9 for shape in SHAPES.values()]
    assert billions == [pytest.approx(8.03, abs=0.01), pytest.approx(70.55, abs=0.01)]
    assert shapes.needed(SHAPES["8b"], 64, 128) - shapes.needed(SHAPES["8b"], 0, 0) == 2**30  # 128 KiB a token


def test_a_shape_is_built_and_armed() -> None:
    model, adapter = shapes.build(TINY), shapes.random_adapter(TINY)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(p.nbytes for p in model.parameters()) == shapes.needed(TINY, 0, 0) - shapes.RESERVE
    assert attach(model, adapter).status()["gate_layers"] == [1, 2]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.usefixtures("little")
def test_the_command_on_a_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "overhead", "--shape", "8b", "--mode", "compile", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {
        "model", "dtype", "device", "mode", "memory", "prefill, batch 1", "decode, batch 2", "first token, batch 1",
    }  # fmt: skip
    assert (found["mode"], found["device"], found["prefill, batch 1"]["n"]) == ("compile", "cpu", 3)
    assert found["prefill, batch 1"]["open"] == 0.0
    adapter = sum(t.nbytes for t in (*shapes.random_adapter(TINY).parameters(), *shapes.random_adapter(TINY).buffers()))
    assert found["memory"]["with"] - found["memory"]["without"] == adapter
    assert main(["bench", "overhead", "--shape", "8b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert " ms with, " in lines[0]
    assert lines[-1].startswith("memory: ")


@pytest.mark.usefixtures("little")
def test_the_command_without_options_says_what_it_said(
    place: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("safegene.calibration.MIN_SEPARATION", 0.0)
    monkeypatch.setattr(overhead, "overheads", functools.partial(overhead.overheads, pairs=2))
    random_adapter(tiny(), tokenizer, anchors=ANCHORS).save_pretrained(place / "adapter")
    arguments = ["bench", "overhead", "--model", str(place / "base"), "--adapter", str(place / "adapter")]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [
        "model", "dtype", "prefill, batch 1", "prefill, batch 16", "decode, batch 1", "decode, batch 16",
    ]  # fmt: skip
    assert main([*arguments, "--mode", "eager"]) == 0
    assert "memory: " in capsys.readouterr().out


def test_a_machine_that_is_too_small(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {"cpu": 19 * 2**30})
    monkeypatch.setattr(shapes, "build", lambda shape: pytest.fail("work was begun"))
    assert main(["bench", "overhead", "--shape", "70b"]) == 1
    assert "safegene: --shape 70b needs 138 GiB of memory, and cpu has 19 GiB free; give" in capsys.readouterr().err
    with pytest.raises(SafegeneError, match="needs 20 GiB of memory"):
        shapes.check_room("8b", 64, 128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["overhead", "--mode", "graphs"], "needs CUDA"),
        (["overhead", "--shape", "8b", "--mode", "graphs"], "needs CUDA"),
        (["overhead", "--mode", "fast"], "not 'fast'"),
        (["overhead", "--shape", "9b"], "8b or 70b, not '9b'"),
        (["overhead", "--shape", "8b", "--dtype", "float32"], "in bfloat16"),
        (["recipe.yaml", "--shape", "8b"], "go with the word overhead"),
    ],
)
def test_what_cannot_be_timed(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
