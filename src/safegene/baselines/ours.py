"""The project's own: the adapter of the base, attached and calibrated."""

from __future__ import annotations

from safegene.adapter import SafetyAdapter
from safegene.attach import attach
from safegene.baselines.method import Cost, Method, Protected, Setting, generated
from safegene.models import LoadedModel


class Adapter(Method):
    """A refused attachment is an error here, and a failure in every mean of the bench."""

    name = "adapter"
    source = "this project"

    def protect(self, loaded: LoadedModel, setting: Setting) -> Protected:
        adapter = SafetyAdapter.from_pretrained(setting.adapter)
        attach(loaded.model, adapter, tokenizer=loaded.tokenizer)
        cost = Cost(examples=len(adapter.config.anchors), extra_parameters=adapter.parameter_count())
        return Protected(loaded.model, loaded.tokenizer, generated(loaded), cost)
