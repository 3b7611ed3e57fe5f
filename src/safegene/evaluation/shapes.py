"""Llama 3's shapes with random weights, and adapters of their recipes' size: what time and memory depend on, without a checkpoint.

Nothing is said about safety here. `recipes/llama-3-8b.yaml` and `llama-3-70b.yaml` name the same layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from safegene import models
from safegene.adapter import SafetyAdapter
from safegene.config import AdapterConfig
from safegene.errors import SafegeneError

DTYPE = torch.bfloat16
GIB = 2**30
RESERVE = 4 * GIB
"""For activations, compiled code and the device's libraries: 8,192 tokens read at once take about 2.5 GiB of it at 70B."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model and of its adapter."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    gate_layers: tuple[int, ...]
    intervention_layers: tuple[int, ...]
    key_value_heads: int = 8
    vocabulary: int = 128_256
    gate_width: int = 16
    rank: int = 16

    def config(self) -> Any:
        """The configuration of transformers."""
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden_size, intermediate_size=self.intermediate_size, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.key_value_heads, vocab_size=self.vocabulary,
            max_position_embeddings=8192,
        )  # fmt: skip


SHAPES = {
    "8b": Shape(4096, 14336, 32, 32, (13, 16, 19), (19, 22, 25)),
    "70b": Shape(8192, 28672, 80, 64, (32, 40, 48), (48, 56, 64)),
}


def needed(shape: Shape, rows: int, positions: int) -> int:
    """Bytes for the weights, for a cache of `rows` sequences of `positions` tokens, and `RESERVE`."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    config = shape.config()
    with torch.device("meta"):
        weights = sum(int(p.numel()) for p in auto.from_config(config).parameters())
    cached: int = 2 * shape.layers * shape.key_value_heads * config.head_dim * rows * positions
    return DTYPE.itemsize * (weights + cached) + RESERVE


def check_room(name: str, rows: int, positions: int) -> None:
    """Whether `build` has room for a shape of `SHAPES`, and for sequences of these sizes.

    Raises:
        SafegeneError: it has not; the message says how much is needed.
    """
    from accelerate.utils import get_max_memory

    want, device = needed(SHAPES[name], rows, positions), models.default_device()
    have = get_max_memory()[0 if device == "cuda" else "cpu"]
    if have < want:
        raise SafegeneError(
            f"--shape {name} needs {math.ceil(want / GIB)} GiB of memory, and {device} has {have // GIB} GiB free; "
            "give a smaller shape or a larger machine."
        )


def build(shape: Shape) -> Any:
    """A model of this shape with random weights, made where it runs: nothing is copied there."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.device(models.default_device()):
        model = auto.from_config(shape.config(), dtype=DTYPE)
    return model.eval()


def random_adapter(shape: Shape) -> SafetyAdapter:
    """A random adapter that fits `build`. Its gate stays shut, as on ordinary text; a GPU does the same work when it is open."""
    adapter = SafetyAdapter(
        AdapterConfig(
            base_model="random weights", architecture="llama", hidden_size=shape.hidden_size, num_layers=shape.layers,
            gate_layers=shape.gate_layers, intervention_layers=shape.intervention_layers, gate_width=shape.gate_width,
            rank=shape.rank, threshold=1e3,
        )
    )  # fmt: skip
    part: Any
    for part in adapter.interventions.values():
        torch.nn.init.normal_(part.up)
    return adapter.requires_grad_(False)
