"""The contract of attach, on every architecture."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TextIteratorStreamer

from conftest import CONFIGS, random_adapter, tiny
from safegene.adapter import Correction, SafetyAdapter, intervene
from safegene.attach import attach
from safegene.errors import AttachError, GateError

FAR = 1e6
"""A threshold no score reaches (or, negative, that every score passes)."""


def logits(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_contract(name: str, ids: torch.Tensor, tmp_path: Any) -> None:
    model = tiny(name)
    before, state = logits(model, ids), {k: v.clone() for k, v in model.state_dict().items()}
    adapter = random_adapter(model, threshold=-FAR)
    handle = attach(model, adapter)
    assert handle.status()["armed"]
    changed = logits(model, ids)
    assert not torch.allclose(changed, before)
    with handle.disabled(), handle.disabled():
        assert torch.equal(logits(model, ids), before)
    alone = torch.cat([logits(model, row[None]) for row in ids])
    torch.testing.assert_close(alone, changed, atol=2e-4, rtol=1e-3)

    mask = torch.ones(3, 11, dtype=torch.long)
    mask[:, :2] = 0
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), ids], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    left = logits(model, padded, attention_mask=mask, position_ids=positions)[:, 2:]
    torch.testing.assert_close(left, changed, atol=2e-4, rtol=1e-3)

    embedded = model.get_input_embeddings()(ids)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=embedded).logits, changed, atol=1e-5, rtol=1e-4)
    kept = dict(max_new_tokens=5, min_new_tokens=5, pad_token_id=0)
    greedy = model.generate(ids, do_sample=False, **kept)
    full = logits(model, greedy[:, :-1])[:, 8:].argmax(-1)
    assert (full == greedy[:, 9:]).float().mean() > 0.9  # the KV cache is the state; ties aside
    model.generate(ids, do_sample=True, **kept)
    model.generate(ids, num_beams=2, do_sample=False, **kept)

    adapter.save_pretrained(tmp_path)
    handle.detach()
    handle.detach()
    assert torch.equal(logits(model, ids), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    again = attach(model, SafetyAdapter.from_pretrained(tmp_path))
    assert torch.equal(logits(model, ids), changed)
    again.detach()


@pytest.mark.parametrize("name", CONFIGS)
def test_closed_gate_is_the_base_bit_for_bit(name: str, ids: torch.Tensor) -> None:
    model = tiny(name)
    before = logits(model, ids)
    attach(model, random_adapter(model, threshold=FAR))
    assert torch.equal(logits(model, ids), before)


@given(
    st.integers(0, 2**31), st.floats(0, 1, width=32), st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
)
@settings(max_examples=40, deadline=None)
def test_intervention_touches_only_open_positions(seed: int, g: float, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    h = torch.randn(2, 3, 8).to(dtype)
    gate = torch.zeros(2, 3, 1)
    gate[0, 1] = g
    up = torch.randn(8, 2)
    up[0, 0] = float("nan")  # must not leak through a closed gate
    weights = Correction(torch.randn(2, 8), torch.randn(2), up, torch.randn(2), torch.randn(1), 1.0)
    out = intervene(h, gate, weights)
    closed = (gate == 0).expand_as(h)
    assert torch.equal(out[closed], h[closed])
    assert out.dtype == dtype


def test_touching_open_positions_only_gives_what_touching_all_gives(
    ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    handle = attach(model, random_adapter(model, threshold=0.0))
    with handle.recording() as record:
        some = logits(model, ids)
    open_at = record[0] > 0
    assert open_at.any()
    assert not open_at.all()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # then every position is touched
    torch.testing.assert_close(some, logits(model, ids), atol=1e-5, rtol=1e-4)


def test_two_threads(ids: torch.Tensor) -> None:
    model = tiny()
    attach(model, random_adapter(model, threshold=0.0))
    want = [logits(model, ids[:1]), logits(model, ids[1:])]
    wrong = []

    def work(part: int) -> None:
        for _ in range(20):
            if not torch.equal(logits(model, ids[:1] if part == 0 else ids[1:]), want[part]):
                wrong.append(part)

    threads = [threading.Thread(target=work, args=(p,)) for p in (0, 1)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_streaming(ids: torch.Tensor, tokenizer: Any) -> None:
    model = tiny()
    attach(model, random_adapter(model, threshold=-FAR))
    want = model.generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(want[0, 9:])


def test_gradient_checkpointing_gives_the_same_gradients(ids: torch.Tensor) -> None:
    def gradient(checkpointing: bool) -> torch.Tensor:
        model = tiny().train()
        attach(model, random_adapter(model, threshold=-FAR))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return model.model.layers[0].mlp.up_proj.weight.grad

    torch.testing.assert_close(gradient(False), gradient(True))


def test_compile(ids: torch.Tensor) -> None:
    model = tiny()
    before = logits(model, ids)
    attach(model, random_adapter(model, threshold=0.0))
    want = logits(model, ids)
    got = logits(torch.compile(model, backend="aot_eager"), ids)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(got, before)


def test_lora_beside_it(ids: torch.Tensor) -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny()
    adapter = random_adapter(model, threshold=-FAR)
    peft = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=True))
    handle = attach(peft, adapter)
    logits(peft, ids)
    peft.add_adapter("other", LoraConfig(target_modules="all-linear"))
    peft.set_adapter("other")
    with pytest.raises(AttachError, match="PEFT"):
        logits(peft, ids)
    handle.detach()


def test_differentiable_gate_has_gradients(ids: torch.Tensor) -> None:
    model = tiny()
    handle = attach(model, random_adapter(model, threshold=0.0))
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    with handle.differentiable():
        model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None
    assert embedded.grad.abs().sum() > 0


def test_nan_score_stops_the_call(ids: torch.Tensor) -> None:
    model = tiny()
    attach(model, random_adapter(model))
    embedded = model.get_input_embeddings()(ids).detach()
    embedded[0, 3] = float("nan")
    with pytest.raises(GateError, match="NaN"), torch.no_grad():
        model(inputs_embeds=embedded)


def test_refusals_to_attach(ids: torch.Tensor, tokenizer: Any) -> None:
    model = tiny()
    before = logits(model, ids)
    adapter = random_adapter(model, tokenizer)
    with pytest.raises(AttachError, match="llama models"):
        attach(tiny("qwen2"), adapter)
    torch.manual_seed(9)
    other = type(model)(model.config).eval()
    with pytest.raises(AttachError, match="from the base"):
        attach(other, adapter)
    adapter.gate.bias[0] = float("nan")
    with pytest.raises(AttachError, match="NaN"):
        attach(model, adapter)
    adapter.gate.bias[0] = 0.0
    assert torch.equal(logits(model, ids), before)
    handle = attach(model, adapter)
    with pytest.raises(AttachError, match="already"):
        attach(model, adapter)
    handle.detach()
