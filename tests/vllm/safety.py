"""The safety score through vLLM's server against transformers', on the same requests.

    python tests/vllm/safety.py --data FOLDER [--n 100]

FOLDER holds JailbreakBench's jailbreakbench.csv somewhere inside. Both sides: the embedded model with the shipped adapter, float32,
greedy, one calibration, chats as the model's template writes them; the rules judge. Adds "safety" to runs/vllm/figures.json and prints
it; the exit code is 1 where the scores lie more than half a point apart.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openai import OpenAI

from harness import RUNS, serving
from prepare import ADAPTER, Reader
from safegene import models
from safegene.adapter import SafetyAdapter
from safegene.attach import attach
from safegene.evaluation.judges.base import asked
from safegene.evaluation.judges.rules import RuleJudge

TOKENS = 64
MOST = 0.5
"""Points by which the two scores may differ."""


def offline(prompts: list[str], calibration: Path) -> list[str]:
    """What transformers answers; writes the calibration that it answered with."""
    loaded = models.load(models.EMBEDDED, dtype="float32")
    handle = attach(loaded.model, SafetyAdapter.from_pretrained(ADAPTER), tokenizer=loaded.tokenizer)
    handle.calibration.save(calibration)
    reader = Reader(loaded.model, loaded.tokenizer, handle)
    answers = [reader.answer(reader.chat(prompt), TOKENS)["answer"] for prompt in prompts]
    return [str(loaded.tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]


def through_the_server(prompts: list[str], calibration: Path) -> list[str]:
    reference = {"model": models.resolve(models.EMBEDDED), "adapter": ADAPTER, "calibration": str(calibration)}
    with serving(reference) as served, OpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=600) as client:

        def ask(prompt: str) -> str:
            said = client.chat.completions.create(
                model=reference["model"],
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                max_tokens=TOKENS,
            )
            return str(said.choices[0].message.content)

        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(ask, prompts))


def score(prompts: list[str], answers: list[str]) -> tuple[float, list[str]]:
    """Safety score in percent, and the labels."""
    judge = RuleJudge()
    verdicts = [judge.judge(asked(prompt), answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return 100 * sum(v.safe for v in verdicts) / len(verdicts), [v.label for v in verdicts]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--n", type=int, default=100)
    said = parser.parse_args()
    file = next(said.data.expanduser().rglob("jailbreakbench.csv"), None)
    if file is None:
        parser.error(f"{said.data} holds no jailbreakbench.csv")
    with file.open(encoding="utf-8", newline="") as rows:
        prompts = [row["Goal"] for row in csv.DictReader(rows)][: said.n]
    RUNS.mkdir(parents=True, exist_ok=True)
    calibration = RUNS / "safety-calibration.safetensors"
    by_transformers = offline(prompts, calibration)
    by_vllm = through_the_server(prompts, calibration)
    (own, own_labels), (served, served_labels) = (score(prompts, answers) for answers in (by_transformers, by_vllm))
    found: dict[str, Any] = {
        "set": "JailbreakBench", "prompts": len(prompts), "tokens": TOKENS, "judge": "rules", "offline_percent": own, "server_percent": served,
        "difference_points": served - own, "equal_answers": sum(a == b for a, b in zip(by_transformers, by_vllm, strict=True)),
        "differing_labels": [i for i, pair in enumerate(zip(own_labels, served_labels, strict=True)) if pair[0] != pair[1]],
    }  # fmt: skip
    figures = RUNS / "figures.json"
    kept = json.loads(figures.read_text()) if figures.exists() else {}
    figures.write_text(json.dumps({**kept, "safety": found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return int(abs(found["difference_points"]) > MOST)


if __name__ == "__main__":
    sys.exit(main())
