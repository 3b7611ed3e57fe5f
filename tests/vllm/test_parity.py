"""vLLM and transformers say the same tokens, however vLLM cuts the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness import Prepared, ask, compare, of, options, protected, round_of

SINGLE = ("harmful", "benign", "middle")


def test_the_references_hold_every_kind(reference: dict[str, Any], figures: dict[str, Any]) -> None:
    counts = {kind: len(of(reference, kind)) for kind in (*SINGLE, "chat", "shared")}
    opened = sum(max(p["prompt_gate"], p["answer_gate"]) > 0 for p in reference["prompts"])
    figures["prompts"] = {**counts, "gate_opened": opened, "nearest_to_threshold": min(p["nearest"] for p in reference["prompts"])}  # fmt: skip
    assert reference["checkpoint_digest_equal"]
    assert counts["harmful"] + counts["benign"] >= 60
    assert counts["middle"] >= 10
    assert counts["chat"] >= 10
    assert all(p["prompt_gate"] <= 0 < p["answer_gate"] for p in of(reference, "middle"))


@pytest.mark.parametrize("mode", ["eager", "compiled", "chunked", "preempted", "tensor_parallel"])
def test_the_same_tokens(mode: str, reference: dict[str, Any], figures: dict[str, Any], tmp_path: Path) -> None:
    more: dict[str, dict[str, Any]] = {
        "eager": {},
        "compiled": {"enforce_eager": False},
        "chunked": {"enable_chunked_prefill": True, "max_num_batched_tokens": 16},
        # 12 blocks of 32 tokens for 16 rows of about 90: most are thrown out and computed again, some of them twice.
        "preempted": {
            "num_gpu_blocks_override": 13,
            "block_size": 32,
            "max_model_len": 352,
            "max_num_batched_tokens": 352,
        },
        "tensor_parallel": {"tensor_parallel_size": 3},  # SmolLM2-135M has nine heads
    }
    prompts = [p for p in of(reference, *SINGLE, "chat") if mode != "preempted" or len(p["prompt"]) < 300]
    job = {"engine": options(reference, **more[mode]), "rounds": [round_of(prompts)]}
    threads = {"OMP_NUM_THREADS": "1"} if mode == "tensor_parallel" else {}  # ranks spin while they wait for each other
    got = ask(tmp_path, job, **protected(reference, **threads))
    differing = compare(prompts, got["answers"][0])
    figures[mode] = {
        "prompts": len(prompts), "equal": len(prompts) - len(differing), "differing": differing, **got["metrics"],
        "start_seconds": got["start_seconds"], "seconds": got["seconds"],
    }  # fmt: skip
    assert differing == []
    if mode == "preempted":
        assert got["metrics"]["vllm:num_preemptions"] >= 20
    if mode == "compiled":
        assert "Warming up model for the compilation" in got["log"]


def test_the_same_tokens_from_the_prefix_cache(
    reference: dict[str, Any], figures: dict[str, Any], tmp_path: Path
) -> None:
    """Questions behind one long prefix, the same again, and chats whose first turn is in the cache with what the adapter did to it."""
    shared, chats = of(reference, "shared"), of(reference, "chat")
    firsts = [p["first"] for p in chats]
    rounds = [round_of(shared[:1], 24), round_of(shared, 24), round_of(shared, 24), round_of(firsts), round_of(chats)]
    engine = options(reference, enable_prefix_caching=True, block_size=32)
    got = ask(tmp_path, {"engine": engine, "rounds": rounds}, **protected(reference))
    asked = [shared[0], *shared, *shared, *({"kind": "first", **f} for f in firsts), *chats]
    differing = compare(asked, [answer for answers in got["answers"] for answer in answers])
    hits = got["metrics"]["vllm:prefix_cache_hits"] / got["metrics"]["vllm:prefix_cache_queries"]
    figures["prefix_cache"] = {"prompts": len(asked), "equal": len(asked) - len(differing), "hit_rate": hits, "differing": differing}  # fmt: skip
    assert differing == []
    assert hits >= 0.8


def test_without_the_adapter_it_is_the_plain_model(
    reference: dict[str, Any], figures: dict[str, Any], tmp_path: Path
) -> None:
    """The plugin is inert where nobody asks for it; and the adapter does change these answers."""
    prompts = of(reference, *SINGLE)
    engine = options(reference)
    del engine["hf_overrides"]
    got = ask(tmp_path, {"engine": engine, "rounds": [round_of(prompts)]})
    differing = {kind: 0 for kind in SINGLE}
    for difference in compare(prompts, got["answers"][0]):
        differing[difference["kind"]] += 1
    figures["plain"] = {"prompts": len(prompts), "changed_by_the_adapter": differing}
    never = [p for p in of(reference, "benign") if max(p["prompt_gate"], p["answer_gate"]) <= 0]
    assert differing["benign"] <= len(of(reference, "benign")) - len(never)
    assert differing["harmful"] >= 0.8 * len(of(reference, "harmful"))


def test_bfloat16_decides_the_same_where_the_margin_is_wide(
    prepared: Prepared, figures: dict[str, Any], tmp_path: Path
) -> None:
    reference = prepared("bfloat16")
    prompts = of(reference, *SINGLE)
    got = ask(tmp_path, {"engine": options(reference), "rounds": [round_of(prompts)]}, **protected(reference))
    differing = compare(prompts, got["answers"][0])
    figures["bfloat16"] = {"prompts": len(prompts), "equal": len(prompts) - len(differing), "differing": differing}
    # bfloat16 keeps eight bits: logits near 20 come in steps of 0.125, and two engines add in two orders.
    assert [d for d in differing if d["margin"] is None or d["margin"] > 0.5] == []
