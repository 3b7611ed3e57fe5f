"""A worker extension for the fault tests: spoils a layer while the engine runs. A norm: of linear weights the CPU keeps packed copies."""

from __future__ import annotations

from typing import Any


class Poison:
    def poison(self, layer: int) -> None:
        worker: Any = self
        worker.get_model().model.layers[layer].post_attention_layernorm.weight.data.fill_(float("nan"))
