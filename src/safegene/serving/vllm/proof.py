"""Proof at start-up, through vLLM's own engine, that the adapter changes what it must change and nothing else.

As `serving.armed`, of which this is the form for an engine that gives log-probabilities and no gate: every anchor is read twice, with
the gate switched off and with it on, alone, through the same graph. Harmful ones must change, ordinary ones must stay.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

from safegene.errors import AttachError, CalibrationError
from safegene.features import end_of_turn
from safegene.models import template_digest, tokenizer_digest
from safegene.serving.armed import MOST, spread
from safegene.serving.vllm.arming import Armament

TOP = 20
"""Log-probabilities that are compared, of the likeliest next tokens: vLLM's default limit."""

MIN_CHANGE = 0.05
"""Largest change of one of them, in nats, from which an anchor counts as changed. Interventions move them by several."""


async def prove(engine: Any, armament: Armament) -> dict[str, Any]:
    """Read anchors with and without the adapter. Nothing else may run on the engine meanwhile.

    Args:
        engine: vLLM's engine client.

    Returns:
        how many anchors of each kind were read, and how many behaved.

    Raises:
        AttachError: the adapter is not in the model, changes nothing, or changes what it must leave alone.
        CalibrationError: the model writes chats otherwise than when it was calibrated.
    """
    start = time.monotonic()
    tokenizer = engine.get_tokenizer()
    config = armament.adapter.config
    if config.tokenizer_digest and tokenizer_digest(tokenizer) != config.tokenizer_digest:
        raise AttachError(f"The tokenizer differs from {config.base_model}'s; serve the one the model was tuned with.")
    if armament.calibration.template not in ("", template_digest(tokenizer)):
        raise CalibrationError("The calibration was made with another chat template; run safegene calibrate again.")
    kinds = {kind: spread(config, kind) for kind in ("harmful", "ordinary")}
    if not kinds["harmful"]:
        raise AttachError("The adapter carries no harmful anchors to prove itself on; train it again.")
    ids = {kind: [end_of_turn(tokenizer, text)[0] for text in texts] for kind, texts in kinds.items()}
    await engine.collective_rpc("safegene_shut")
    plain = {kind: [await _next(engine, i) for i in some] for kind, some in ids.items()}
    await engine.collective_rpc("safegene_arm", args=(True,))
    await engine.collective_rpc("safegene_status")
    adapted = {kind: [await _next(engine, i) for i in some] for kind, some in ids.items()}
    changes = {k: [largest(a, b) for a, b in zip(adapted[k], plain[k], strict=True)] for k in ids}
    proof = {
        "harmful": {"read": len(ids["harmful"]), "changed": sum(c >= MIN_CHANGE for c in changes["harmful"])},
        "ordinary": {"read": len(ids["ordinary"]), "unchanged": sum(c < MIN_CHANGE for c in changes["ordinary"])},
    }
    if not proof["harmful"]["changed"] > MOST * proof["harmful"]["read"]:
        raise AttachError(
            f"The adapter changes only {proof['harmful']['changed']} of {proof['harmful']['read']} answers to harmful anchors; "
            "calibrate again, or train an adapter for this model."
        )
    if ids["ordinary"] and not proof["ordinary"]["unchanged"] > MOST * proof["ordinary"]["read"]:
        raise AttachError(
            f"The adapter leaves only {proof['ordinary']['unchanged']} of {proof['ordinary']['read']} ordinary anchors alone; "
            "calibrate again, or train an adapter for this model."
        )
    return {**proof, "largest_change": max(changes["harmful"]), "seconds": round(time.monotonic() - start, 2)}


async def _next(engine: Any, ids: list[int]) -> dict[int, float]:
    """The likeliest next tokens and their log-probabilities."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    salt = secrets.token_hex(16)  # what was computed with the gate off must not be found again in the prefix cache
    prompt = TokensPrompt(prompt_token_ids=ids, cache_salt=salt)
    asked = SamplingParams(temperature=0.0, max_tokens=1, logprobs=TOP, detokenize=False)
    steps = [step.outputs[0].logprobs async for step in engine.generate(prompt, asked, f"safegene-{salt}")]
    if not steps or not steps[-1]:
        raise AttachError("The engine gave no log-probabilities for the proof; give it --max-logprobs 20 or more.")
    return {token: float(found.logprob) for token, found in steps[-1][0].items()}


def largest(one: dict[int, float], other: dict[int, float]) -> float:
    """Largest difference of two lists of log-probabilities. A token that one of them lacks lies below its last."""
    low, high = min(other.values()), min(one.values())
    return max(abs(max(one.get(t, high), high) - max(other.get(t, low), low)) for t in {*one, *other})
