"""One engine, one job, in a process of its own: vLLM keeps processes and memory that a test must not inherit.

    python tests/vllm/engine.py JOB.json OUT.json

The job holds the engine's options and what to ask, in rounds: a round is asked together, the next when it has ended. `poison`: the
layer whose weights become NaN after the first round.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    start = time.time()
    llm = LLM(**job["engine"], disable_log_stats=False)
    ready = time.time()
    answers: list[list[list[int]]] = []
    for n, asked in enumerate(job["rounds"]):
        if n and job.get("poison") is not None:
            llm.collective_rpc("poison", args=(job["poison"],))
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in asked["prompts"]]
        sampling = SamplingParams(temperature=0.0, max_tokens=asked["tokens"])
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        answers.append([list(o.outputs[0].token_ids) for o in outputs])
        print("answered", json.dumps(answers[-1]), flush=True)  # what is known where a later round ends the engine
    seconds = time.time() - ready
    counted = {m.name: getattr(m, "value", None) for m in llm.get_metrics() if hasattr(m, "value")}
    kept = ("vllm:num_preemptions", "vllm:prefix_cache_queries", "vllm:prefix_cache_hits")
    return {
        "answers": answers, "start_seconds": round(ready - start, 1), "seconds": round(seconds, 1),
        "metrics": {name: counted.get(name) for name in kept},
    }  # fmt: skip


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
