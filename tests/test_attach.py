"""The contract of attach, on every architecture."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, TextIteratorStreamer, pipeline

from conftest import CONFIGS, GQA, SIZE, random_adapter, tiny
from safegene.adapter import Correction, SafetyAdapter, intervene
from safegene.attach import attach
from safegene.errors import AttachError, GateError
from safegene.models import decoder_layers

FAR = 1e6
"""A threshold no score reaches (or, negative, that every score passes)."""

GREEDY = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)

every_architecture = pytest.mark.parametrize("name", CONFIGS)


def logits(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


@every_architecture
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

    embedded = model.get_input_embeddings()(ids)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=embedded).logits, changed, atol=1e-5, rtol=1e-4)
    greedy = model.generate(ids, **GREEDY)
    full = logits(model, greedy[:, :-1])[:, 8:].argmax(-1)
    assert (full == greedy[:, 9:]).float().mean() > 0.9  # the KV cache is the state; ties aside
    model.generate(ids, **{**GREEDY, "do_sample": True})
    model.generate(ids, num_beams=2, **GREEDY)

    adapter.save_pretrained(tmp_path)
    handle.detach()
    handle.detach()
    assert torch.equal(logits(model, ids), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    again = attach(model, SafetyAdapter.from_pretrained(tmp_path))
    assert torch.equal(logits(model, ids), changed)
    again.detach()


@every_architecture
def test_closed_gate_is_the_base_bit_for_bit(name: str, ids: torch.Tensor) -> None:
    model = tiny(name)
    before = logits(model, ids)
    attach(model, random_adapter(model, threshold=FAR))
    assert torch.equal(logits(model, ids), before)


@functools.cache
def half_open(name: str) -> Any:
    """A model whose gate opens at some positions."""
    model = tiny(name)
    attach(model, random_adapter(model, threshold=0.0))
    return model


@every_architecture
@given(rows=st.lists(st.lists(st.integers(3, 299), min_size=1, max_size=8), min_size=2, max_size=4), left=st.booleans())
@settings(max_examples=5, deadline=None)
def test_a_row_alone_is_the_row_in_a_batch(name: str, rows: list[list[int]], left: bool) -> None:
    model, longest = half_open(name), max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        at = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), 1
    together = logits(model, ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0))
    for i, row in enumerate(rows):
        alone = logits(model, torch.tensor([row]))[0]
        torch.testing.assert_close(together[i][mask[i].bool()], alone, atol=2e-4, rtol=1e-3)


@every_architecture
def test_generate_in_a_left_padded_batch_and_from_embeddings(name: str, ids: torch.Tensor) -> None:
    model = tiny(name)
    handle = attach(model, random_adapter(model, threshold=-FAR))
    lengths = (9, 4)
    batch, mask = torch.zeros_like(ids[:2]), torch.zeros_like(ids[:2])
    for row, n in enumerate(lengths):
        batch[row, -n:], mask[row, -n:] = ids[row, :n], 1
    together = model.generate(batch, attention_mask=mask, **GREEDY)[:, 9:]
    alone = [model.generate(ids[row : row + 1, :n], **GREEDY)[:, n:] for row, n in enumerate(lengths)]
    assert torch.equal(together, torch.cat(alone))
    embedded = model.get_input_embeddings()(batch).detach()
    assert torch.equal(model.generate(inputs_embeds=embedded, attention_mask=mask, **GREEDY), together)
    with handle.disabled():
        assert not torch.equal(model.generate(batch, attention_mask=mask, **GREEDY)[:, 9:], together)


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float16) for name in CONFIGS), ("llama", torch.bfloat16)])
def test_half_precision(name: str, dtype: torch.dtype, ids: torch.Tensor) -> None:
    whole, model = tiny(name), tiny(name).to(dtype)
    before = logits(model, ids)
    shut = attach(model, random_adapter(model, threshold=FAR))
    assert torch.equal(logits(model, ids), before)
    shut.detach()
    for some in (model, whole):
        attach(some, random_adapter(some, threshold=-FAR))
    found, exact = logits(model, ids), logits(whole, ids)
    assert found.dtype == dtype
    assert not torch.allclose(found, before)
    assert torch.nn.functional.cosine_similarity(found.float().flatten(), exact.flatten(), dim=0) > 0.98


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
    restoration = torch.randn(3, 8), torch.randn(8, 3), torch.full((8,), torch.nan)  # nor this one
    weights = Correction(torch.randn(2, 8), torch.randn(2), up, torch.randn(2), torch.randn(1), 1.0, *restoration)
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


@every_architecture
def test_two_threads(name: str, ids: torch.Tensor) -> None:
    model = half_open(name)
    parts = (ids[:1], ids[1:])
    want = [logits(model, part) for part in parts]
    found: list[list[torch.Tensor]] = [[], []]

    def work(which: int) -> None:
        for _ in range(8):
            found[which].append(logits(model, parts[which]))

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for which in (0, 1):
        assert len(found[which]) == 8
        for some in found[which]:
            torch.testing.assert_close(some, want[which], atol=1e-5, rtol=1e-5)


@every_architecture
def test_streaming(name: str, ids: torch.Tensor, tokenizer: Any) -> None:
    model = tiny(name)
    attach(model, random_adapter(model, threshold=-FAR))
    want = model.generate(ids[:1], **GREEDY)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(ids[:1], streamer=streamer, **GREEDY)
    assert "".join(streamer) == tokenizer.decode(want[0, 9:])


@every_architecture
def test_pipeline(name: str, tokenizer: Any) -> None:
    model = tiny(name)
    attach(model, random_adapter(model, threshold=-FAR))
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    found = answer("hello there", return_full_text=False, **GREEDY)[0]["generated_text"]
    encoded = tokenizer("hello there", return_tensors="pt")
    want = model.generate(**encoded, **GREEDY)[0, encoded["input_ids"].shape[1] :]
    assert found == tokenizer.decode(want, skip_special_tokens=True)


@every_architecture
def test_gradient_checkpointing_gives_the_same_gradients(name: str, ids: torch.Tensor) -> None:
    def gradient(checkpointing: bool) -> torch.Tensor:
        model = tiny(name).train()
        attach(model, random_adapter(model, threshold=-FAR))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        lowest = decoder_layers(model)[0].parameters()  # below gate and interventions: both were passed on the way
        return torch.cat([p.grad.flatten() for p in lowest if p.grad is not None])

    plain = gradient(False)
    assert plain.abs().sum() > 0
    torch.testing.assert_close(gradient(True), plain)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize(("name", "backend"), [("llama", "aot_eager"), ("gemma2", "eager"), ("gpt_neox", "eager")])
def test_compile(name: str, backend: str, ids: torch.Tensor) -> None:
    model = tiny(name)
    before = logits(model, ids)
    attach(model, random_adapter(model, threshold=0.0))
    want = logits(model, ids)
    got = logits(torch.compile(model, backend=backend), ids)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(got, before)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("disabled_first", [False, True])
def test_a_compiled_model_obeys_disabled_in_either_order(disabled_first: bool, ids: torch.Tensor) -> None:
    model = tiny()
    plain = logits(model, ids)
    handle = attach(model, random_adapter(model, threshold=0.0))
    armed, compiled = logits(model, ids), torch.compile(model, backend="eager")
    for disabled in (disabled_first, not disabled_first, disabled_first):
        with handle.disabled() if disabled else contextlib.nullcontext():
            torch.testing.assert_close(logits(compiled, ids), plain if disabled else armed, atol=1e-4, rtol=1e-3)


@every_architecture
@pytest.mark.filterwarnings("ignore::safegene.errors.UncalibratedWarning")
@pytest.mark.filterwarnings(
    "ignore:.*_pattern keys did not match:RuntimeWarning"
)  # PEFT's own pattern for experts, of which none is targeted
def test_lora_beside_it_merged_or_not(name: str, ids: torch.Tensor) -> None:
    model = tiny(name)
    base, adapter = logits(model, ids), random_adapter(model, threshold=-FAR)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for key, weight in peft.named_parameters():
            if "lora_B" in key:
                weight.normal_(std=0.01)
    before = logits(peft, ids)
    assert not torch.allclose(before, base)
    handle = attach(peft, adapter)
    beside = logits(peft, ids)
    assert not torch.allclose(beside, before)
    with handle.disabled():
        assert torch.equal(logits(peft, ids), before)
    handle.detach()
    assert torch.equal(logits(peft, ids), before)
    merged = peft.merge_and_unload()
    attach(merged, adapter)
    torch.testing.assert_close(logits(merged, ids), beside, atol=2e-4, rtol=1e-3)


def test_another_lora_stops_the_call(ids: torch.Tensor) -> None:
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
    for key, value, said in (("hidden_size", 64, "32 features"), ("num_hidden_layers", 6, "5 layers")):
        other = AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZE, key: value}, **GQA))
        with pytest.raises(AttachError, match=said):
            attach(other, adapter)
    foreign = copy.deepcopy(tokenizer)
    foreign.add_tokens(["quick"])
    with pytest.raises(AttachError, match="tokenizer differs"):
        attach(model, adapter, tokenizer=foreign)
    torch.manual_seed(9)
    other = type(model)(model.config).eval()
    with pytest.raises(AttachError, match="from the base"):
        attach(other, adapter)
    adapter.gate.bias[0] = float("nan")
    with pytest.raises(AttachError, match="NaN"):
        attach(model, adapter)
    adapter.gate.bias[0] = 0.0
    assert torch.equal(logits(model, ids), before)
    assert not any(layer._forward_hooks for layer in decoder_layers(model))
    handle = attach(model, adapter)
    with pytest.raises(AttachError, match="already"):
        attach(model, adapter)
    with pytest.raises(AttachError, match="detach, copy"):
        copy.deepcopy(model)
    handle.detach()
