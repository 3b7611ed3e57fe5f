"""Does a request ask for harm, read before anything answers it? A linear head over the default judge's reader.

That judge's own heads read answers. Behind a stand-in for one ("Sure, here is how to do that.") its harm head finds an eighth of the
harmful requests at 2 % of the ordinary ones; this head, fitted on 240 labelled pairs, finds three quarters, and a third of
their twins (docs/log.md): a small reader sees what a request is about better than what it is for.

    f = [e1 e2 m1 m2]: two layers, where the prompt ends, and the same layers' mean over the prompt      4 d numbers
    P(harmful) = sigmoid(w · f + b); a request asks for harm above a level that 2 % of ordinary ones reach
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from safegene.features import end_of_turn, gate_features
from safegene.training.data import Pair

STRENGTH = 1e-3
"""Inverse regularisation on standardised features."""

REFUSED = 0.02
"""Share of ordinary requests, not fitted on, that lie above the level: a guard that refuses more is taken off."""


def request_reader(
    model: Any, tokenizer: Any, layers: Sequence[int], pairs: Sequence[Pair], ordinary: Sequence[str]
) -> Callable[[Sequence[str]], list[bool]]:
    """Fit the head on both sides of `pairs` and half of the `ordinary` requests, its level on the other half; returns what tells
    which requests ask for harm."""

    def features(texts: Sequence[str]) -> Any:
        chats = [end_of_turn(tokenizer, text)[0] for text in texts]
        found: dict[int, Any] = {}
        for i, hidden in gate_features(model, layers, chats, tokenizer.pad_token_id or 0):
            found[i] = torch.cat([hidden[:, -1].flatten(), hidden.mean(1).flatten()]).float().numpy()
        return np.stack([found[i] for i in range(len(chats))])

    half = len(ordinary) // 2
    harmful, harmless = [p.harmful for p in pairs], [*(p.twin for p in pairs), *ordinary[:half]]
    head = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=2000, class_weight="balanced"))
    head.fit(features([*harmful, *harmless]), [True] * len(harmful) + [False] * len(harmless))
    level = float(np.quantile(head.decision_function(features(ordinary[half:])), 1 - REFUSED))

    def asks_for_harm(requests: Sequence[str]) -> list[bool]:
        return [bool(score > level) for score in head.decision_function(features(requests))] if requests else []

    return asks_for_harm
