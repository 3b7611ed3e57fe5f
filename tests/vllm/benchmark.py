"""What the adapter costs under vLLM: throughput and time to first token, with it and without, restarts alternating.

    python tests/vllm/benchmark.py [--restarts 5] [--compiled]

Every restart is a process of its own and adds one line to runs/vllm/benchmark-MODE.jsonl; the same command goes on from what is
there. Prints the figures as JSON: medians over restarts, and the pairs' differences with their range; where the range of one mode's
restarts is wider than the difference, that says "not measurable".
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BATCHES, ROUNDS, TOKENS = (1, 16), 3, 64
MODES = ("plain", "adapter")


def measure(reference: dict[str, Any], compiled: bool) -> dict[str, float]:
    """One restart: tokens a second of each batch, and seconds to the first token of each batch, medians over rounds."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    more = {} if os.environ.get("SAFEGENE_ADAPTER") is None else {"hf_overrides": {"architectures": ["SafeGeneLlamaForCausalLM"]}}  # fmt: skip
    llm = LLM(
        model=reference["model"], dtype=reference["dtype"], max_model_len=512, max_num_seqs=max(BATCHES), enforce_eager=not compiled,
        enable_prefix_caching=False, generation_config="vllm", **more,
    )  # fmt: skip
    benign = [TokensPrompt(prompt_token_ids=p["prompt"]) for p in reference["prompts"] if p["kind"] == "benign"]
    found: dict[str, float] = {}
    for batch in BATCHES:
        prompts = [benign[i % len(benign)] for i in range(batch)]
        for name, tokens in (("first", 1), ("rate", TOKENS)):
            sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
            llm.generate(prompts, sampling, use_tqdm=False)
            seconds = []
            for _ in range(ROUNDS if tokens > 1 else 4 * ROUNDS):
                start = time.perf_counter()
                llm.generate(prompts, sampling, use_tqdm=False)
                seconds.append(time.perf_counter() - start)
            middle = statistics.median(seconds)
            found[f"{name}_{batch}"] = batch * tokens / middle if name == "rate" else middle
    return found


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    by = {mode: [line for line in lines if line["mode"] == mode] for mode in MODES}
    pairs = list(zip(by["plain"], by["adapter"], strict=False))
    figures: dict[str, Any] = {"restarts": len(pairs)}
    for name in [f"{kind}_{batch}" for kind in ("first", "rate") for batch in BATCHES]:
        values = {mode: [line[name] for line, _ in pairs] if mode == "plain" else [line[name] for _, line in pairs] for mode in MODES}  # fmt: skip
        # More seconds and fewer tokens a second are both a loss.
        losses = [
            100 * (b / a - 1 if name.startswith("first") else a / b - 1) for a, b in zip(*values.values(), strict=True)
        ]
        spread = 100 * (max(values["plain"]) / min(values["plain"]) - 1)
        loss = statistics.median(losses)
        figures[name] = {
            **{mode: statistics.median(v) for mode, v in values.items()}, "loss_percent": round(loss, 2),
            "loss_range": [round(min(losses), 2), round(max(losses), 2)], "plain_spread_percent": round(spread, 2),
            "measurable": bool(abs(loss) > spread),
        }  # fmt: skip
    return figures


def main() -> None:
    from harness import RUNS, environment, protected

    parser = argparse.ArgumentParser()
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--one", type=Path, help="(used by itself) one restart, on the references of this file")
    said = parser.parse_args()
    if said.one is not None:
        print(json.dumps(measure(json.loads(said.one.read_text()), said.compiled)))
        return
    newest = max(RUNS.glob("*/reference-float32.json"), key=lambda p: p.stat().st_mtime)
    reference = {
        **json.loads(newest.read_text()),
        "calibration": str(newest.with_name("calibration-float32.safetensors")),
    }
    kept = RUNS / f"benchmark-{'compiled' if said.compiled else 'eager'}.jsonl"
    lines = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    while len(lines) < 2 * said.restarts:
        n = len(lines) // 2
        mode = MODES[(len(lines) + n) % 2]  # who goes first changes from pair to pair
        command = [sys.executable, __file__, "--one", str(newest), *(["--compiled"] if said.compiled else [])]
        done = subprocess.run(
            command, env=environment(**(protected(reference) if mode == "adapter" else {})), stdout=subprocess.PIPE, text=True, check=True
        )  # fmt: skip
        told = next(said for said in reversed(done.stdout.splitlines()) if said.startswith("{"))
        line = {"mode": mode, **json.loads(told)}
        lines.append(line)
        with kept.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), file=sys.stderr)
    print(json.dumps(summary(lines), indent=1))


if __name__ == "__main__":
    main()
