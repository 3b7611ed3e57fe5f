"""vLLM's models with an adapter inside. `plugin.register` names them; vLLM imports this file when one is served."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralDecoderLayer, MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM

from safegene.errors import AttachError
from safegene.serving.vllm.plugin import ADAPTER, PROTECTED
from safegene.serving.vllm.protection import Protected, ProtectedLayer


class SafeGeneLlamaDecoderLayer(ProtectedLayer, LlamaDecoderLayer):  # type: ignore[misc]
    pass


class SafeGeneMistralDecoderLayer(ProtectedLayer, MistralDecoderLayer):  # type: ignore[misc]
    pass


class SafeGeneQwen2DecoderLayer(ProtectedLayer, Qwen2DecoderLayer):  # type: ignore[misc]
    pass


class SafeGeneQwen3DecoderLayer(ProtectedLayer, Qwen3DecoderLayer):  # type: ignore[misc]
    pass


class SafeGeneLlamaForCausalLM(Protected, LlamaForCausalLM):  # type: ignore[misc]
    layer_class = SafeGeneLlamaDecoderLayer


class SafeGeneMistralForCausalLM(Protected, MistralForCausalLM):  # type: ignore[misc]
    layer_class = SafeGeneMistralDecoderLayer


class SafeGeneQwen2ForCausalLM(Protected, Qwen2ForCausalLM):  # type: ignore[misc]
    layer_class = SafeGeneQwen2DecoderLayer


class SafeGeneQwen3ForCausalLM(Protected, Qwen3ForCausalLM):  # type: ignore[misc]
    layer_class = SafeGeneQwen3DecoderLayer


class Refused(LlamaForCausalLM):  # type: ignore[misc]
    """What every other architecture means where SAFEGENE_ADAPTER is set.

    It must look like a model that generates: a class that cannot be imported, or generates nothing, is passed over with a line in
    the log, and vLLM tries another.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        """Raises:
        AttachError: always.
        """
        model = vllm_config.model_config
        raise AttachError(
            f"{ADAPTER} is set, and {' or '.join(model.architectures)} has no protected form under --model-impl {model.model_impl}; "
            f"serve one of {', '.join(PROTECTED)} without --model-impl, or unset {ADAPTER}."
        )
