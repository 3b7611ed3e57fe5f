"""A worker extension for the fault tests: spoils a layer while the engine runs."""

from __future__ import annotations

from typing import Any


class Poison:
    def poison(self, layer: int) -> None:
        worker: Any = self
        worker.get_model().model.layers[layer].mlp.down_proj.weight.data.fill_(float("nan"))
