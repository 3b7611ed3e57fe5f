"""The plugin's entry point (`vllm.general_plugins`). vLLM calls `register` in every process it starts.

vLLM serves on when a plugin's module cannot be imported, so this one imports nothing; what `register` raises does stop it. And it
registers architectures under names of our own: a server without this plugin does not know them, and refuses to start.
"""

from __future__ import annotations

import contextlib
import os

ADAPTER, CALIBRATION = "SAFEGENE_ADAPTER", "SAFEGENE_CALIBRATION"
"""Environment variables: adapter (folder, shipped name or hub id) and calibration file."""

AUDIT, MAX_BODY, TIMEOUT = "SAFEGENE_AUDIT", "SAFEGENE_MAX_BODY", "SAFEGENE_TIMEOUT"
"""Environment variables of the HTTP middleware (`health`), which vLLM makes without arguments: the audit log's file, bytes, seconds."""

TESTED = "0.32."
"""Versions of vLLM whose inside this plugin was written for (ADR 8)."""

PREFIX = "SafeGene"
PROTECTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""vLLM's architectures that there is a protected form of; its name is PREFIX and vLLM's name."""

CLASSES = "safegene.serving.vllm.architectures"


def register() -> None:
    """Make the protected architectures known. Inert for every other model: a class is imported when a model asks for it, by its
    name in config.json or --hf-overrides, or by a block "safegene" in config.json (`config_json`).

    With SAFEGENE_ADAPTER set no other architecture is served: whoever set it and forgot the override, or chose an architecture
    that has no protected form, would serve without protection. vLLM's own names mean the protected classes then, and every name
    that has none, the Transformers backends' included, means one that refuses. Draft models stay: they choose no token.

    Raises:
        AttachError: SAFEGENE_ADAPTER is set, and this vLLM was not tested.
    """
    from vllm import ModelRegistry

    if os.environ.get(ADAPTER):
        check_version()
        from vllm.model_executor.models.registry import _SPECULATIVE_DECODING_MODELS as drafts

        for name in {*ModelRegistry.get_supported_archs()} - {*drafts}:
            kind = f"{PREFIX}{name}" if name in PROTECTED else "Refused"
            ModelRegistry.register_model(name, f"{CLASSES}:{kind}")
    for name in PROTECTED:
        ModelRegistry.register_model(f"{PREFIX}{name}", f"{CLASSES}:{PREFIX}{name}")
    with contextlib.suppress(ImportError):  # a vLLM that was not tested may read config.json elsewhere
        import safegene.serving.vllm.config_json  # noqa: F401


def check_version() -> None:
    """Raises:
    AttachError: this vLLM was not tested.
    """
    from vllm.version import __version__

    if not __version__.startswith(TESTED):
        from safegene.errors import AttachError

        raise AttachError(f"vLLM is {__version__}; this plugin is for {TESTED}x only: pip install 'vllm=={TESTED}*'.")  # fmt: skip
