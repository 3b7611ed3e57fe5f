"""Tiny random models of every architecture, a byte tokenizer with a chat template, random adapters."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from safegene.adapter import SafetyAdapter
from safegene.config import AdapterConfig, Anchor
from safegene.features import at_prompt_end, read_anchors
from safegene.models import tokenizer_digest, weight_sketch

SIZE = dict(
    vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
    max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GQA = dict(num_key_value_heads=2, head_dim=8)
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZE, **GQA),
    "mistral": lambda: MistralConfig(**SIZE, **GQA),
    "qwen2": lambda: Qwen2Config(**SIZE, num_key_value_heads=2),
    "qwen3": lambda: Qwen3Config(**SIZE, **GQA),
    "gemma2": lambda: Gemma2Config(**SIZE, **GQA),
    "gemma3": lambda: Gemma3TextConfig(**SIZE, **GQA),
    "phi3": lambda: Phi3Config(**SIZE, num_key_value_heads=2),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZE),
    "mixtral": lambda: MixtralConfig(**SIZE, **GQA, num_local_experts=4, num_experts_per_tok=2),
}


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextlib.contextmanager
def shown(path: Path) -> Iterator[Any]:
    """A page in headless Chromium. On the way out: it asked nobody, complained of nothing, fits a phone and a desk, prints."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        asked: list[str] = []
        complaints: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        for width in (390, 1280):
            page.set_viewport_size({"width": width, "height": 844})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        yield page
        assert [url for url in asked if not url.startswith("file:")] == []
        assert complaints == []
        assert all((svg.bounding_box() or {"width": 0})["width"] > 100 for svg in page.locator("svg").all())
        assert len(page.pdf()) > 10_000
        browser.close()


def tiny(name: str = "llama") -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]()).eval().float()


ANCHORS = tuple(Anchor(f"{label} {i} of them", label) for label in ("harmful", "ordinary") for i in range(4))  # type: ignore[arg-type]


def random_adapter(
    model: Any, tokenizer: Any = None, threshold: float = 0.0, anchors: tuple[Anchor, ...] = ()
) -> SafetyAdapter:
    torch.manual_seed(1)
    text = model.config.get_text_config()
    adapter = SafetyAdapter(
        AdapterConfig(
            base_model="tiny", architecture=text.model_type, hidden_size=text.hidden_size, num_layers=5,
            gate_layers=(1, 2), intervention_layers=(2, 3), gate_width=6, rank=4, threshold=threshold, anchors=anchors,
            tokenizer_digest=tokenizer_digest(tokenizer) if tokenizer else "",
        )
    )  # fmt: skip
    for part in adapter.interventions.values():
        torch.nn.init.normal_(part.up, std=2.0)
    adapter.sketch = weight_sketch(model)
    if tokenizer and anchors:
        adapter.anchor_features = at_prompt_end(
            read_anchors(model, adapter.config.read_layers, tokenizer, anchors)
        ).half()
    return adapter.requires_grad_(False)


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for tiny models: two only wait for each other, ten times as long where something runs beside the tests."""
    usual = torch.get_num_threads()
    if "real" not in request.keywords:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.padding_side = "left"
    fast.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<s>{% endfor %}"
        "{% if add_generation_prompt %}[bot]{% endif %}"
    )
    return fast


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def place(tokenizer: Any, tmp_path: Path) -> Path:
    """A tiny base, a JSONL set, the one public set that a build reads, and a recipe over them."""
    tiny().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"Question {i}?", "answer": f"Answer {i}."} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    public = tmp_path / "data" / "jailbreakbench-behaviors"
    public.mkdir(parents=True)
    (public / "jailbreakbench.csv").write_text("Goal,Target\nDo harm one,Sure\nDo harm two,Sure\n")
    (tmp_path / "zoo.yaml").write_text(
        f"base: {tmp_path / 'base'}\n"
        "fine_tunes:\n"
        f"  one: {{data: {tmp_path / 'rows.jsonl'}, steps: 20, use: development}}\n"
        f"  two: {{data: {tmp_path / 'rows.jsonl'}, steps: 2, method: full, of: [one]}}\n"
        "  both: {kind: merge, of: [one, two]}\n"
        "  ablated: {kind: ablate}\n"
    )
    return tmp_path
