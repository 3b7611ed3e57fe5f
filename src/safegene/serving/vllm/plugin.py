"""The plugin's entry point (`vllm.general_plugins`). vLLM calls `register` in every process it starts.

vLLM serves on when a plugin's module cannot be imported, so this one imports nothing; what `register` raises does stop it. And it
registers architectures under names of our own: a server without this plugin does not know them, and refuses to start.
"""

from __future__ import annotations

import os

ADAPTER, CALIBRATION = "SAFEGENE_ADAPTER", "SAFEGENE_CALIBRATION"
"""Environment variables: adapter (folder, shipped name or hub id) and calibration file."""

TESTED = "0.32."
"""Versions of vLLM whose inside this plugin was written for (ADR 8)."""

PREFIX = "SafeGene"
PROTECTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""vLLM's architectures that there is a protected form of; its name is PREFIX and vLLM's name."""


def register() -> None:
    """Make the protected architectures known. Inert for every other model: a class is imported when a model asks for it, by its
    name in config.json or --hf-overrides.

    With SAFEGENE_ADAPTER set, vLLM's own names mean the protected classes, too: whoever set it and forgot the override would
    serve without protection.

    Raises:
        AttachError: SAFEGENE_ADAPTER is set, and this vLLM was not tested.
    """
    from vllm import ModelRegistry

    wanted = bool(os.environ.get(ADAPTER))
    if wanted:
        check_version()
    for name in PROTECTED:
        where = f"safegene.serving.vllm.architectures:{PREFIX}{name}"
        for known_as in (f"{PREFIX}{name}", name) if wanted else (f"{PREFIX}{name}",):
            ModelRegistry.register_model(known_as, where)


def check_version() -> None:
    """Raises:
    AttachError: this vLLM was not tested.
    """
    from vllm.version import __version__

    if not __version__.startswith(TESTED):
        from safegene.errors import AttachError

        raise AttachError(f"vLLM is {__version__}; this plugin is for {TESTED}x only: pip install 'vllm=={TESTED}*'.")  # fmt: skip
