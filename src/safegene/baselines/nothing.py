"""Do nothing: the fine-tune as it is."""

from __future__ import annotations

from safegene.baselines.method import Cost, Method, Protected, Setting, generated
from safegene.models import LoadedModel


class Nothing(Method):
    """The yardstick of every other method."""

    name = "nothing"
    source = "–"

    def protect(self, loaded: LoadedModel, setting: Setting) -> Protected:
        return Protected(loaded.model, loaded.tokenizer, generated(loaded), Cost())
