"""config.json as vLLM reads it, through its `register_config_parser`: a block "safegene" asks for protection, whatever architecture
stands beside it. Without the block a configuration stays as vLLM reads it.
"""

from __future__ import annotations

from typing import Any

from vllm.transformers_utils.config import HFConfigParser, MistralConfigParser, register_config_parser

from safegene.serving.vllm.plugin import PREFIX


class Asking:
    """Mixin before one of vLLM's parsers: with the block the architecture is the protected one. Where there is none, vLLM knows no
    such name and does not start."""

    def parse(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        found, config = super().parse(*args, **kwargs)  # type: ignore[misc]
        if getattr(config, "safegene", None):
            # A configuration without architectures must not be left to vLLM, which guesses them from the model's type.
            config.architectures = [f"{PREFIX}{name.removeprefix(PREFIX)}" for name in config.architectures or ("",)]
            config.auto_map = None  # by which, with --trust-remote-code, vLLM would find another class for a name that it does not know
        return found, config


@register_config_parser("hf")
class SafeGeneHFConfigParser(Asking, HFConfigParser):  # type: ignore[misc]
    pass


@register_config_parser("mistral")
class SafeGeneMistralConfigParser(Asking, MistralConfigParser):  # type: ignore[misc]
    """Mistral's own format takes what its params.json lacks from config.json, the block too."""
