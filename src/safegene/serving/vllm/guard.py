"""Which configurations of vLLM cannot be protected. They are refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from safegene.errors import AttachError


def refuse(vllm_config: Any, *, developing: bool) -> None:
    """Let a configuration pass in which every answer goes through the adapter.

    What is not named here was looked at and changes nothing: chunked prefill, prefix caching, preemption, CUDA graphs, both model
    runners, tensor parallelism (every rank holds whole rows and decides the same), prompt embeddings, and speculative decoding,
    whose draft is unprotected but whose every token the protected model accepts or refuses.

    Args:
        developing: whether VLLM_SERVER_DEV_MODE is on.

    Raises:
        AttachError: with the first thing that cannot be protected.
    """
    for reason in _reasons(vllm_config, developing):
        raise AttachError(reason)


def _reasons(vllm_config: Any, developing: bool) -> Iterator[str]:
    model, parallel, draft = vllm_config.model_config, vllm_config.parallel_config, vllm_config.speculative_config
    if vllm_config.lora_config is not None:
        yield "A LoRA that is loaded while serving changes the model after its calibration; merge it into the checkpoint, calibrate that, and leave --enable-lora out."
    if model.quantization is not None:
        yield f"Weights quantised by {model.quantization} are not those that were calibrated; leave --quantization out."
    if model.runner_type != "generate":
        yield f"The adapter guards answers, and --runner {model.runner_type} gives none; leave it out."
    if model.enable_sleep_mode or vllm_config.weight_transfer_config is not None:
        yield "Weights that are exchanged while serving are not those that were calibrated; leave sleep mode and weight transfer out."
    if developing:
        yield "VLLM_SERVER_DEV_MODE opens routes that change weights and call into workers; unset it."
    if vllm_config.kv_transfer_config is not None:
        yield "Keys and values from another server may have been computed without the adapter; leave --kv-transfer-config out."
    if parallel.use_ubatching:
        yield "Two half batches at a time would overwrite each other's gate; leave --enable-dbo and --ubatch-size out."
    if parallel.enable_hc_sp or parallel.use_sequence_parallel_moe:
        yield "With sequence parallelism a rank holds only a part of the rows; leave it out."
    if parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1:
        yield "Context parallelism is not tested with the adapter; leave --prefill- and --decode-context-parallel-size out."
    if parallel.data_parallel_size > 1:
        yield "The proof at start asks one replica; start a server for each, behind a balancer, and leave --data-parallel-size out."
    if parallel.enable_batch_sharded_sampling:
        yield "Sharded sampling goes past the watch for NaN; leave --enable-batch-sharded-sampling out."
    if draft is not None and draft.rejection_sample_method == "synthetic":
        yield "Synthetic acceptance takes draft tokens that the protected model did not choose; use another --speculative-config."
