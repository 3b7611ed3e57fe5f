"""Attaching: the only file with hooks. In place, fail closed, gone again on `detach`."""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safegene.adapter import Correction, SafetyAdapter, intervene
from safegene.calibration import Calibration, calibrate_gate, fold_gate
from safegene.errors import AttachError, CalibrationError, DriftError, GateError, UncalibratedWarning
from safegene.gate import open_hard, open_soft
from safegene.models import (
    check_fit,
    decoder_layers,
    sketch_distance,
    template_digest,
    tokenizer_digest,
    unwrap,
    weight_sketch,
    weights_digest,
)
from safegene.refusals import MIN_REFUSED, checked, refused, restorations
from safegene.restoration import HARMLESS_WEIGHTS

MAX_DISTANCE = 0.7
"""Relative weight distance (see `models.sketch_distance`) beyond which a model is no fine-tune of the base."""
SAME = 0.01
"""Relative weight distance under which a model is the base itself, in whatever precision."""

_MARK = "_safegene_handle"

Look = Callable[[int, Tensor, Tensor, Correction], Correction]


class _Pass(threading.local):
    """What one forward pass hands up the layers. Per thread, overwritten by every pass: no request has any state."""

    inner: Tensor | None = None
    g: Tensor | None = None
    at: Tensor | None = None
    failed: Tensor | None = None


class Handle:
    """An armed adapter on a model. Made by `attach`."""

    def __init__(self, model: nn.Module, adapter: SafetyAdapter, calibration: Calibration) -> None:
        self.model = model
        self.adapter = adapter
        self.calibration = calibration
        self._pass = _Pass()
        self._off = threading.local()
        self._open: Callable[[Tensor], Tensor] = open_hard
        self._peft_active = _active_peft(model)
        self._hooks: list[Any] = []
        self.record: list[Tensor] | None = None
        self._looking: Look | None = None
        layers, config = decoder_layers(model), adapter.config
        self._watched = [_first_weight(layers[i]) for i in (config.gate_layers[-1], *config.corrected_layers)]
        self._place()
        self._arm()

    def _devices(self) -> list[torch.device]:
        """Where the last gate layer and the intervention layers are. Asked before every pass, so of one tensor each."""
        return [getattr(module, name).device for module, name in self._watched]

    def _place(self) -> None:
        """Fold calibration into the weights and put each where its layer is."""
        calibration = self.calibration
        self._on = self._devices()
        self._gate = fold_gate(self.adapter, calibration).to(self._on[0])
        self._weights: dict[int, Correction] = {}
        corrections = calibration.corrections(self.adapter).items()
        for device, (layer, correction) in zip(self._on[1:], corrections, strict=True):
            self._weights[layer] = correction.to(device)

    def _arm(self) -> None:
        config, layers = self.adapter.config, decoder_layers(self.model)
        try:
            for index, layer in enumerate(config.gate_layers):
                self._hooks.append(layers[layer].register_forward_hook(self._gate_hook(index)))
            for layer in config.corrected_layers:
                self._hooks.append(layers[layer].register_forward_hook(self._intervention_hook(layer)))
            outer = unwrap(self.model)
            self._hooks.append(outer.register_forward_pre_hook(self._before))
            self._hooks.append(outer.register_forward_hook(self._after))
            expected = len(config.gate_layers) + len(config.corrected_layers) + 2
            if len(self._hooks) != expected:
                raise AttachError(f"Placed {len(self._hooks)} of {expected} hooks; nothing is armed, report this.")
            setattr(outer, _MARK, self)
            _forget_compiled()
        except BaseException:
            self._unhook()
            raise

    def _gate_hook(self, index: int) -> Callable[..., None]:
        last = index == len(self.adapter.config.gate_layers) - 1

        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if self.is_disabled:
                return
            hidden = output[0] if isinstance(output, tuple) else output
            below = self._pass.inner if index else None
            inner = self._gate.partial(hidden.to(self._gate.bias.device), index, below)
            if not last:
                self._pass.inner = inner
                return
            opening = self._gate.opening(inner)
            self._pass.failed = opening.sum()  # NaN if any score is; looked at once, after the pass
            self._pass.g = g = self._open(opening)
            # On the CPU one look at where it is open is cheaper than adding nothing there at every layer; elsewhere it would
            # wait for the device. None: everywhere.
            self._pass.at = None
            if g.device.type == "cpu" and not torch.compiler.is_compiling():
                at = g[..., 0] > 0
                self._pass.at = None if bool(at.all()) else at.nonzero(as_tuple=False)
            if self.record is not None:
                self.record.append(opening.detach()[..., 0].cpu())

        return hook

    def _intervention_hook(self, layer: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            if self.is_disabled:
                return None
            g = self._pass.g
            if g is None:
                raise GateError("The gate was not read in this pass; run the whole model, in one thread a pass.")
            hidden = output[0] if isinstance(output, tuple) else output
            if self._looking is not None:
                self._weights[layer] = self._looking(layer, hidden, g, self._weights[layer])
            at, weights = self._pass.at, self._weights[layer]
            if at is not None and not len(at):
                return None
            if at is None:
                changed = intervene(hidden, g.to(hidden.device), weights)
            else:
                where = tuple(at.unbind(1))
                changed = hidden.index_put(where, intervene(hidden[where], g[where].to(hidden.device), weights))
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    def _before(self, _module: nn.Module, _args: Any) -> None:
        self._pass.g = self._pass.inner = None
        if self.is_disabled or torch.compiler.is_compiling():
            return
        if self._devices() != self._on:  # the model was moved
            self._place()
        if _active_peft(self.model) != self._peft_active:
            raise AttachError("The active PEFT adapters changed after attach; detach, then attach and calibrate again.")

    def _after(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if self.is_disabled or torch.compiler.is_compiling():
            return
        failed = self._pass.failed
        if failed is not None and bool(torch.isnan(failed.detach())):
            raise GateError("The gate's score is NaN; check the model's weights and inputs for NaN or overflow.")

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        raise AttachError("A model with an adapter attached cannot be copied; detach, copy, and attach to both.")

    @property
    def is_disabled(self) -> bool:
        """Whether this thread runs inside `disabled()`."""
        return getattr(self._off, "depth", 0) > 0

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The unadapted model, exactly, in this thread; nests and survives exceptions."""
        self._off.depth = getattr(self._off, "depth", 0) + 1
        try:
            yield
        finally:
            self._off.depth -= 1

    @contextlib.contextmanager
    def differentiable(self) -> Iterator[None]:
        """A soft gate with gradients everywhere, for attacks; not for serving."""
        self._open, before = open_soft, self._open
        try:
            yield
        finally:
            self._open = before

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Collect the gate's opening (s − τ) / w, [batch, positions], of every pass; not for compiled models."""
        self.record = []
        try:
            yield self.record
        finally:
            self.record = None

    @contextlib.contextmanager
    def looking(self, look: Look) -> Iterator[None]:
        """At every corrected layer call `look(layer, residual, g, weights)` first, and correct with the weights it returns, from then on."""
        self._looking = look
        try:
            yield
        finally:
            self._looking = None

    def detach(self) -> None:
        """Remove every hook; weights and logits are again what they were, bit for bit. Safe to call twice."""
        self._unhook()
        outer = unwrap(self.model)
        if getattr(outer, _MARK, None) is self:
            delattr(outer, _MARK)

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        _forget_compiled()

    def status(self) -> dict[str, Any]:
        """What is armed: layers, parameters, calibration and its report."""
        config = self.adapter.config
        return {
            "armed": bool(self._hooks) and not self.is_disabled,
            "base_model": config.base_model,
            "gate_layers": list(config.gate_layers),
            "intervention_layers": list(config.intervention_layers),
            "parameters": self.adapter.parameter_count(),
            "calibrated": self.calibration.checkpoint != "",
            "threshold": self.calibration.threshold,
            "strength": self.calibration.strength,
            "report": self.calibration.report,
        }


def _first_weight(layer: nn.Module) -> tuple[nn.Module, str]:
    """The first module inside `layer` that has a parameter of its own, and its name."""
    return next((m, name) for m in layer.modules() for name, _ in m.named_parameters(recurse=False))


def _forget_compiled() -> None:
    """Make compiled code look at the model again: it does not notice hooks that come or go after its first call."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _active_peft(model: nn.Module) -> tuple[str, ...]:
    if not hasattr(model, "peft_config"):
        return ()
    active = getattr(model, "active_adapters", ())
    try:
        names = active() if callable(active) else active
    except ValueError:  # transformers, of the model inside a PEFT model: its adapters are PEFT's
        names = {name for m in _lora_layers(model) for name in getattr(m, "active_adapters", ())}
    disabled = any(getattr(m, "disable_adapters", False) is True for m in _lora_layers(model))
    return ("(disabled)",) if disabled else tuple(sorted(names))


def _lora_layers(model: nn.Module) -> Iterator[nn.Module]:
    # One tuner layer is enough: PEFT switches all of them together, and this runs before every pass.
    for module in model.modules():
        if hasattr(module, "lora_A"):
            yield module
            return


def attach(
    model: Any,
    adapter: SafetyAdapter,
    *,
    tokenizer: Any = None,
    calibration: Calibration | str | Path | None = None,
    allow_drift: bool = False,
) -> Handle:
    """Arm `adapter` on `model`, in place; the object keeps its class.

    With a tokenizer it calibrates at once (forward passes only, seconds); with a calibration, or the file of one, it uses that; with
    neither it uses the base's thresholds, which a fine-tune outgrows: then it warns (UncalibratedWarning), unless the model is the base.

    Args:
        allow_drift: attach although the gate has lost its way here, or the weights lie far from the base's.

    Raises (the model is left as it was):
        AttachError: wrong architecture, size, tokenizer or base; weights not floating point or not loaded; an adapter with NaN; one is
            attached already.
        DriftError: the model moved further than the adapter was trained for, and `allow_drift` is false.
        CalibrationError: the calibration belongs to another checkpoint, adapter or chat template, or cannot be read; the model cannot
            generate, or its hidden states hold NaN; the adapter carries no anchors, or the tokenizer no chat template.
    """
    distance = check(model, adapter, tokenizer, allow_drift=allow_drift)
    if isinstance(calibration, str | Path):
        calibration = Calibration.load(Path(calibration))
    if calibration is not None:
        if calibration.adapter != adapter.config.weights_sha256 or not calibration.fits(adapter):
            raise CalibrationError("The calibration was made for another adapter; run safegene calibrate again.")
        if calibration.checkpoint != weights_digest(model):
            raise CalibrationError("The calibration was made for another checkpoint; run safegene calibrate again.")
        if tokenizer is not None and calibration.template not in ("", template_digest(tokenizer)):
            raise CalibrationError("The calibration was made with another chat template; run safegene calibrate again.")
    elif tokenizer is not None:
        calibration = _calibrate(model, adapter, tokenizer)
    else:
        calibration = Calibration.of_base(adapter)
        if distance > SAME:
            warnings.warn(
                f"The adapter is attached with the thresholds of {adapter.config.base_model} to another model, where it misses "
                "much; pass tokenizer= to calibrate, or calibration=.", UncalibratedWarning, stacklevel=2,
            )  # fmt: skip
    if calibration.outside and not allow_drift:
        raise DriftError(f"{calibration.outside}; retrain the adapter for this model, or pass allow_drift=True.")
    return Handle(model, adapter, calibration)


def calibrate(model: Any, adapter: SafetyAdapter, tokenizer: Any) -> Calibration:
    """What `attach` would measure and set on `model`, to be saved for a server; the model is left as it was.

    Drift raises nothing here: `Calibration.outside` tells it, and `attach` refuses such a calibration.

    Raises:
        AttachError, CalibrationError: as `attach`.
    """
    check(model, adapter, tokenizer)
    return _calibrate(model, adapter, tokenizer)


def _calibrate(model: Any, adapter: SafetyAdapter, tokenizer: Any) -> Calibration:
    """The gate's calibration and the lightest restoration with which the harmful anchors kept out of it are refused as on the base."""
    found, config = calibrate_gate(model, adapter, tokenizer), adapter.config
    if not config.refused:
        return found
    calibration, best, enough = found, -1.0, config.refused - 1 / len(checked(config.anchors))
    # Nothing to lead back to where the base refused no anchor, or none short enough.
    for weight in HARMLESS_WEIGHTS if adapter.residuals.shape[1] else (0.0,):
        handle = Handle(model, adapter, found)
        try:
            tried = found.restored(restorations(handle, tokenizer, weight)) if weight else found
            share = refused(model, tokenizer, config)
        finally:
            handle.detach()
        if share > best:
            said = {"anchors_refused": share, "anchors_refused_on_base": config.refused, "harmless_weight": weight}
            calibration, best = replace(tried, report={**found.report, **said}), share
        if share >= enough - 1e-6:
            break
    if best < MIN_REFUSED * config.refused and not found.outside:
        outside = f"Only {100 * best:.0f} % of the harmful anchors are refused here"
        calibration = replace(calibration, outside=outside)
    return calibration


def check(model: Any, adapter: SafetyAdapter, tokenizer: Any = None, *, allow_drift: bool = False) -> float:
    """Everything that can be checked without running the model.

    Returns:
        how far the weights lie from the base's (`models.sketch_distance`).

    Raises:
        AttachError: with the first thing that does not fit.
    """
    config, base = adapter.config, unwrap(model)
    if getattr(base, _MARK, None) is not None:
        raise AttachError("An adapter is attached already; call handle.detach() first.")
    check_fit(config, base.config.get_text_config())
    if len(decoder_layers(model)) != config.num_layers:
        raise AttachError("The model's decoder layers do not match its config; load it again.")
    if any(p.is_meta for p in model.parameters()):
        raise AttachError("A part of the model is offloaded; load it whole on its devices, or quantised.")
    if not next(model.parameters()).is_floating_point() and not hasattr(base, "hf_quantizer"):
        raise AttachError("The model's weights are not floating point; load it in float32, bfloat16 or float16.")
    if tokenizer is not None and config.tokenizer_digest and tokenizer_digest(tokenizer) != config.tokenizer_digest:
        raise AttachError(f"The tokenizer differs from {config.base_model}'s; pass the one the model was tuned with.")
    if any(not torch.isfinite(p).all() for p in adapter.parameters()):
        raise AttachError("The adapter's weights hold NaN or infinity; fetch or train it again.")
    distance = sketch_distance(adapter.sketch, weight_sketch(model)) if adapter.sketch.numel() else 0.0
    if not distance <= MAX_DISTANCE and not allow_drift:
        raise AttachError(
            f"The model's weights lie {distance:.2f} from the base {config.base_model} (limit {MAX_DISTANCE}); "
            "attach to a fine-tune of that base, or pass allow_drift=True."
        )
    return distance
