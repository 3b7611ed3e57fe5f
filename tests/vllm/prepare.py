"""The references: what transformers answers with the adapter attached, in the environment that vLLM runs in.

    python tests/vllm/prepare.py OUT [--dtype bfloat16]

Writes OUT/calibration-DTYPE.safetensors and OUT/reference-DTYPE.json: prompts as token ids, greedy answers, the gate's opening at every
position that was read, and the margin between the two likeliest tokens. One row at a time: no padding, so nothing but the engine
differs from vLLM. Prompts are the project's own texts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import safegene
from safegene import models
from safegene.adapter import SafetyAdapter
from safegene.attach import Handle, attach

ADAPTER = "smollm2-135m-instruct"
TEXT = Path(safegene.__file__).parent
TOKENS = 40
HARMFUL, BENIGN, MIDDLE, CHATS, SHARED = 30, 30, 12, 12, 24
"""Prompts of each kind: single requests, those that open the gate only in mid-answer, two-turn chats, questions behind a long prefix."""
BATCH, SEARCHED = 32, 480
"""How many rows are looked through at a time, and how many in all, for those of the second kind."""


def rows(pattern: str, field: str) -> list[str]:
    """One field of all files, the files taking turns: the first few are of every category."""
    files = [[json.loads(line).get(field) for line in p.read_text().splitlines()] for p in sorted(TEXT.glob(pattern))]
    longest = max(map(len, files))
    return [texts[i] for i in range(longest) for texts in files if i < len(texts) and texts[i]]


class Reader:
    """Greedy answers of an armed model, and what the gate said."""

    def __init__(self, model: Any, tokenizer: Any, handle: Handle) -> None:
        self.model, self.tokenizer, self.handle = model, tokenizer, handle

    def chat(self, text: str, system: str = "") -> list[int]:
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": text})
        rendered = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def answer(self, ids: Sequence[int], tokens: int = TOKENS) -> dict[str, Any]:
        """Continue `ids` by at most `tokens`, up to the end of the turn."""
        with self.handle.recording() as record:
            out = self.model.generate(
                torch.tensor([list(ids)]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=tokens,
                do_sample=False, temperature=None, top_p=None, top_k=None, output_logits=True, return_dict_in_generate=True,
                pad_token_id=self.tokenizer.pad_token_id,
            )  # fmt: skip
        best = torch.cat([step.float() for step in out.logits]).topk(2).values
        gates = [float(g) for r in record for g in r[0]]
        return {
            "prompt": list(ids), "answer": out.sequences[0, len(ids) :].tolist(), "margin": (best[:, 0] - best[:, 1]).tolist(),
            "prompt_gate": max(gates[: len(ids)]), "answer_gate": max(gates[len(ids) :], default=float("-inf")),
            "nearest": min(abs(g) for g in gates),
        }  # fmt: skip

    @torch.inference_mode()
    def gates(self, chats: Sequence[list[int]]) -> Iterator[tuple[float, float]]:
        """The gate's highest opening in each prompt and in its answer. In batches: to look for prompts, not to compare."""
        for start in range(0, len(chats), BATCH):
            some = chats[start : start + BATCH]
            longest = max(map(len, some))
            pad = self.tokenizer.pad_token_id
            batch = torch.tensor([[*[pad] * (longest - len(ids)), *ids] for ids in some])
            mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in some])
            with self.handle.recording() as record:
                self.model.generate(batch, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, temperature=None,
                                    top_p=None, top_k=None, pad_token_id=pad)  # fmt: skip
            later = torch.cat(record[1:], dim=1).amax(1)
            prompt = record[0].masked_fill(mask == 0, -9.0).amax(1)
            yield from zip(prompt.tolist(), later.tolist(), strict=True)

    def second_turn(self, first: dict[str, Any], text: str) -> list[int]:
        """The chat's ids as they stand in the cache, and another request after them."""
        turn = f"<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        answer = [t for t in first["answer"] if t != end]
        return first["prompt"] + answer + list(self.tokenizer(turn, add_special_tokens=False)["input_ids"])


def opened_late(reader: Reader, wanted: int) -> Iterator[dict[str, Any]]:
    """Answers in which the gate opens, and not before. They begin with all but the end of a harmful request: of their own accord
    too few open it so late (docs/log.md)."""
    benign = rows("training/text/ordinary_held_out.jsonl", "text")
    begun = []
    for i, text in enumerate(
        [t for t in rows("training/text/pairs/*.jsonl", "harmful") if 25 < len(t) < 110][:SEARCHED]
    ):
        said = reader.tokenizer(f"Sure! Here is an example of a dangerous request: {text}", add_special_tokens=False)
        begun.append(reader.chat(benign[i % len(benign)]) + list(said["input_ids"])[: -3 - i % 4])
    found = 0
    for ids, (before, later) in zip(begun, reader.gates(begun), strict=True):
        if before > 0 or later <= 0:
            continue
        read = reader.answer(ids)
        if read["prompt_gate"] <= 0 < read["answer_gate"]:
            yield {"kind": "middle", **read}
            found += 1
            if found == wanted:
                return


def read_all(reader: Reader) -> Iterator[dict[str, Any]]:
    """Every kind of prompt, answered."""
    harmful = rows("training/text/pairs/*.jsonl", "harmful")
    benign = [t for t in rows("training/text/ordinary_held_out.jsonl", "text") if len(t) < 400]
    for text in harmful[:HARMFUL]:
        yield {"kind": "harmful", **reader.answer(reader.chat(text))}
    for text in benign[:BENIGN]:
        yield {"kind": "benign", **reader.answer(reader.chat(text))}
    yield from opened_late(reader, MIDDLE)
    for i in range(CHATS):  # harmless or harmful first, harmless or harmful then
        first = (benign, harmful)[i % 2][HARMFUL + i]
        second = (benign, harmful)[i // 2 % 2][2 * HARMFUL + i]
        one = reader.answer(reader.chat(first))
        yield {"kind": "chat", "first": one, **reader.answer(reader.second_turn(one, second))}
    rules = " ".join(f"Rule {i}: answer item number {i} in plain words and keep it short." for i in range(1, 31))
    for i in range(SHARED):
        text = (benign, harmful)[i % 2][3 * HARMFUL + i // 2]
        yield {"kind": "shared", **reader.answer(reader.chat(text, rules), 24)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="float32")
    said = parser.parse_args()
    said.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    loaded = models.load(models.EMBEDDED, dtype=said.dtype)
    adapter = SafetyAdapter.from_pretrained(ADAPTER)
    handle = attach(loaded.model, adapter, tokenizer=loaded.tokenizer)
    handle.calibration.save(said.out / f"calibration-{said.dtype}.safetensors")
    prompts = list(read_all(Reader(loaded.model, loaded.tokenizer, handle)))
    whole = {
        "model": models.resolve(models.EMBEDDED), "adapter": ADAPTER, "dtype": said.dtype, "prompts": prompts,
        "checkpoint_digest_equal": models.checkpoint_digest(Path(models.resolve(models.EMBEDDED)), getattr(torch, said.dtype))
        == models.weights_digest(loaded.model),
        "seconds": round(time.time() - start, 1),
    }  # fmt: skip
    (said.out / f"reference-{said.dtype}.json").write_text(json.dumps(whole))
    kinds = {
        kind: sum(p["kind"] == kind for p in prompts) for kind in ("harmful", "benign", "middle", "chat", "shared")
    }
    opened = sum(max(p["prompt_gate"], p["answer_gate"]) > 0 for p in prompts)
    print(json.dumps({"prompts": kinds, "gate_opened": opened, "nearest": min(p["nearest"] for p in prompts)}))


if __name__ == "__main__":
    main()
