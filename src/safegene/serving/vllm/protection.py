"""Where gate and interventions sit in a vLLM model, which weights it accepts, and what is watched while it serves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import safegene.serving.vllm.operator  # noqa: F401  registers the two operators
from safegene.adapter import Correction
from safegene.calibration import fold_gate
from safegene.errors import AttachError, GateError
from safegene.gate import FoldedGate
from safegene.models import WeightsDigest, check_fit
from safegene.serving.vllm import arming, guard
from safegene.serving.vllm.plugin import check_version


class Station(nn.Module):
    """What the adapter does after one decoder layer. All numbers are buffers: inputs of a compiled graph, not part of it."""

    g: Tensor
    out: Tensor
    out_bias: Tensor
    kept: tuple[Tensor, Tensor] | None = None
    """The gate's last numbers while it is switched off for the proof (see `worker`)."""

    def __init__(
        self, inner: Tensor, g: Tensor, gate: FoldedGate | None, first: bool, last: bool, turn: Correction | None
    ) -> None:
        super().__init__()
        self.reads, self.first, self.last, self.turns = gate is not None, first, last, turn is not None
        self._keep(inner=inner, g=g)
        if gate is not None:
            self._keep(weight=gate.weight[0], bias=gate.bias, out=gate.out, out_bias=gate.out_bias)
        if turn is not None:
            strength = torch.as_tensor(turn.strength, dtype=torch.float32, device=g.device)
            self._keep(
                **{f"turn_{name}": tensor for name, tensor in turn._replace(strength=strength)._asdict().items()}
            )

    def _keep(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, hidden: Tensor, residual: Tensor) -> None:
        """hidden, residual: [tokens, d], changed in place."""
        if self.reads:
            torch.ops.safegene.read_gate(
                hidden, residual, self.weight, self.bias, self.out, self.out_bias, self.inner, self.g, self.first, self.last
            )  # fmt: skip
        if self.turns:
            torch.ops.safegene.turn(
                hidden, residual, self.g, self.turn_down, self.turn_bias, self.turn_up, self.turn_wish, self.turn_wish_bias,
                self.turn_strength, self.turn_lead, self.turn_back, self.turn_offset,
            )  # fmt: skip


class ProtectedLayer(nn.Module):
    """Mixin before a decoder layer's class: the layer, then its station."""

    safegene: Station

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        hidden, residual = super().forward(*args, **kwargs)
        self.safegene(hidden, residual)
        return hidden, residual


class Protected(nn.Module):
    """Mixin before a vLLM model's class. `layer_class`: the protected form of its decoder layers."""

    layer_class: type[ProtectedLayer]
    model: Any
    sealed = False
    """Whether the proof was made, after which nothing switches the gate off (see `worker`)."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        """Raises:
        SafegeneError: this vLLM, its configuration, the adapter or the calibration cannot protect this model.
        """
        from vllm import envs

        check_version()
        guard.refuse(vllm_config, developing=envs.VLLM_SERVER_DEV_MODE)
        config = vllm_config.model_config
        armament = arming.load(*arming.settings(config.hf_config, config.model))
        check_fit(armament.adapter.config, config.hf_text_config)
        # Which layers have a station is part of the compiled graph and of no key that vLLM knows of. This is one of them: it is
        # hashed into the names of the compilation caches, which are read at the first pass.
        vllm_config.additional_config["safegene"] = armament.digest
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.armament, self.accepted = armament, False
        self.loading = (config.dtype, bool(getattr(config.hf_text_config, "tie_word_embeddings", False)))
        scheduled = vllm_config.scheduler_config.max_num_batched_tokens
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        self.stations = self._place(max(scheduled, captured), vllm_config.device_config.device)
        self.watch = Watch(vllm_config.device_config.device)

    def _place(self, tokens: int, device: torch.device) -> list[Station]:
        """Put the stations after their layers. vLLM builds the layers; those that have a station change their class, so their weights
        keep their names and the compiler finds one source for each buffer."""
        adapter, calibration = self.armament.adapter, self.armament.calibration
        config, k = adapter.config, len(adapter.config.gate_layers)
        wanted = sorted({*config.gate_layers, *config.corrected_layers})
        here = [layer for layer in wanted if self.model.start_layer <= layer < self.model.end_layer]
        if here and here != wanted:
            raise AttachError(
                f"Layers {wanted} must lie on one pipeline rank, and some lie beside {here}; use fewer pipeline ranks, or tensor parallelism."
            )
        gate = fold_gate(adapter, calibration).to(device)
        inner = torch.zeros(tokens, config.gate_width, dtype=torch.float32, device=device)
        g = torch.zeros(tokens, 1, dtype=torch.float32, device=device)
        corrections = calibration.corrections(adapter)
        stations = []
        for layer in here:
            own, turn = None, None
            index = config.gate_layers.index(layer) if layer in config.gate_layers else -1
            if index >= 0:
                own = gate._replace(weight=(gate.weight[index],))
            if layer in corrections:
                turn = corrections[layer].to(device)
            module = self.model.layers[layer]
            if not issubclass(self.layer_class, type(module)):
                raise AttachError(
                    f"Layer {layer} is a {type(module).__name__}, which has no protected form; report this."
                )
            if "forward" in vars(module):
                raise AttachError(
                    f"Layer {layer}'s forward is wrapped and would go past the adapter; leave --cpu-offload-gb and --offload-group-size out."
                )
            module.__class__ = self.layer_class
            module.safegene = Station(inner, g, own, index == 0, index == k - 1, turn)
            stations.append(module.safegene)
        return stations

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take the weights as they come from disk, and accept them where they are those that were calibrated.

        Raises:
            CalibrationError: they are others.
        """
        dtype, tied = self.loading
        self.accepted = False
        digest = WeightsDigest(dtype, tied=tied)
        loaded: set[str] = super().load_weights(digest.passing(weights))  # type: ignore[misc]
        arming.check_checkpoint(self.armament.calibration, digest.hexdigest())
        self.accepted = True
        return loaded

    def compute_logits(self, hidden_states: Tensor) -> Any:
        """vLLM calls this once a step, outside every graph, before a token is drawn: nothing is drawn from what is not protected.

        Raises:
            GateError: the weights came by a way on which they were not seen, or a position was NaN. The engine stops.
        """
        if not self.accepted:
            raise GateError("The weights were not checked on their way in; use --load-format auto or safetensors.")
        self.watch.look(hidden_states)
        return super().compute_logits(hidden_states)  # type: ignore[misc]


class Watch(nn.Module):
    """Notices NaN without making the device wait.

    A gate's score is NaN where the residual is not finite (its own weights are, and its input is normalised); what is not finite at a
    layer stays so to the last one, in its row and, through attention, in the rows after it, of which the last is drawn from. So the
    rows that are drawn from are looked at. The gate's own values would not do: graphs run on padded rows, too, whose content is
    arbitrary.
    """

    failed: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("failed", torch.zeros(1, dtype=torch.bool, device=device), persistent=False)
        pinned = torch.device(device).type == "cuda"
        self.seen = torch.zeros(1, dtype=torch.bool, device="cpu", pin_memory=pinned)

    def look(self, hidden: Tensor) -> None:
        """hidden: final states [rows, d] that are drawn from. On a GPU the answer is that of a step or two ago; until it comes, the
        gate, which a NaN opens, protects.

        Raises:
            GateError: a row was NaN, now or before.
        """
        self.failed.logical_or_(hidden.isnan().any())
        self.seen.copy_(self.failed, non_blocking=True)
        if bool(self.seen):
            raise GateError("The gate's score is NaN; check the model's weights for NaN or overflow, and restart.")
