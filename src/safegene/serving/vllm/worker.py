"""What the API server may ask of a worker (vLLM's `worker_extension_cls`): what is armed, and, once, before it listens, to switch the
gate off for the proof. No request reaches this; `guard` refuses the mode in which one could.
"""

from __future__ import annotations

from typing import Any

from safegene.errors import AttachError, GateError
from safegene.serving.vllm.protection import Protected

SHUT = -1.0
"""(s − τ) / w of a gate that is switched off: below 0 at every position."""


class Extension:
    """vLLM adds these methods to its worker's class."""

    def safegene_status(self) -> dict[str, Any]:
        """What this rank has armed.

        Raises:
            AttachError: the model has no adapter, or its gate is switched off.
        """
        protected = _model(self)
        gates = [station for station in protected.stations if station.last]
        if any(station.kept is not None for station in gates):
            raise AttachError("The gate is switched off; restart the server.")
        config = protected.armament.adapter.config
        read = sum(station.reads for station in protected.stations)
        turned = sum(station.turns for station in protected.stations)
        if (read, turned) not in ((len(config.gate_layers), len(config.corrected_layers)), (0, 0)):
            raise AttachError(f"{read} gate layers and {turned} corrections are in place; report this.")
        return {"armament": protected.armament.digest, "accepted": protected.accepted, "stations": read + turned}

    def safegene_shut(self) -> None:
        """Switch the gate off until `safegene_arm`: the unadapted model, through the same graph.

        Raises:
            GateError: this was sealed already.
        """
        protected = _model(self)
        if protected.sealed:
            raise GateError("The proof was made; the gate stays armed.")
        for station in protected.stations:
            if station.last:
                station.kept = station.kept or (station.out.clone(), station.out_bias.clone())
                station.out.zero_()
                station.out_bias.fill_(SHUT)

    def safegene_arm(self, seal: bool) -> None:
        """Switch it on again; with `seal` nothing switches it off any more."""
        protected = _model(self)
        for station in protected.stations:
            if station.kept is not None:
                out, out_bias = station.kept
                station.out.copy_(out)
                station.out_bias.copy_(out_bias)
                station.kept = None
        protected.sealed = protected.sealed or seal


def _model(worker: Any) -> Protected:
    model = worker.get_model()
    if not isinstance(model, Protected):
        raise AttachError(f"{type(model).__name__} has no adapter inside; start it with safegene serve --engine vllm.")
    return model
