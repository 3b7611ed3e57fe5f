"""The project's own: the adapter of the base, attached and calibrated, or, to see what calibration is worth, not calibrated."""

from __future__ import annotations

import warnings

from safegene.adapter import SafetyAdapter
from safegene.attach import attach
from safegene.baselines.method import Cost, Method, Protected, Setting, generated
from safegene.errors import UncalibratedWarning
from safegene.models import LoadedModel

ARMED = ("adapter.py", "gate.py", "calibration.py", "attach.py")
"""What attaching and answering with the adapter come from, beside its weights and settings."""


class Adapter(Method):
    """A refused attachment is an error here, and a failure in every mean of the bench."""

    name = "adapter"
    source = "this project"
    rests_on = ARMED

    def protect(self, loaded: LoadedModel, setting: Setting) -> Protected:
        return _attached(loaded, setting, calibrated=True)

    def force(self, loaded: LoadedModel, setting: Setting) -> Protected:
        """Attach in spite of a refusal: would it have protected?

        Raises:
            AttachError: the adapter does not fit the model at all.
        """
        return _attached(loaded, setting, calibrated=True, allow_drift=True)


class Uncalibrated(Method):
    """The same adapter with the base's threshold and features, nothing restored."""

    name = "uncalibrated"
    source = "this project, calibration off"
    rests_on = ARMED

    def protect(self, loaded: LoadedModel, setting: Setting) -> Protected:
        return _attached(loaded, setting, calibrated=False)


def _attached(loaded: LoadedModel, setting: Setting, *, calibrated: bool, allow_drift: bool = False) -> Protected:
    adapter = SafetyAdapter.from_pretrained(setting.adapter)
    tokenizer = loaded.tokenizer if calibrated else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UncalibratedWarning)  # that is what is measured
        handle = attach(loaded.model, adapter, tokenizer=tokenizer, allow_drift=allow_drift)
    cost = Cost(examples=len(adapter.config.anchors) if calibrated else 0, extra_parameters=adapter.parameter_count())
    return Protected(loaded.model, loaded.tokenizer, generated(loaded), cost, report=handle.calibration.report)
