"""A training on little text, as `accelerate launch` starts it: launched.py MODEL OUT."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import PartialState

from safegene.training import data
from safegene.training.arguments import TrainingArguments
from safegene.training.trainer import train

torch.set_num_threads(1)
pairs, ordinary, talks = data.pairs(0, 1, 0.0)[0], data.ordinary(), data.conversations()[:6]
data.pairs = lambda *_args: (pairs[:40], pairs[40:48])  # type: ignore[assignment]
data.ordinary = lambda *_args: ordinary[:30]  # type: ignore[assignment]
data.conversations = lambda: talks  # type: ignore[assignment]
train(
    TrainingArguments(
        model=sys.argv[1], gate_layers=(1, 2), intervention_layers=(2, 3), gate_width=4, rank=2, dtype="float32", frames_per_core=1,
        harmless_answers=16, answer_tokens=4, long_answers=8, long_answer_tokens=6, shadow_steps=1, gate_steps=6, probe_steps=6,
        steps=4, rows_per_step=6, anchors_per_kind=4,
    ),
    Path(sys.argv[2]),
)  # fmt: skip
(Path(sys.argv[2]) / f"rank-{PartialState().process_index}").touch()
