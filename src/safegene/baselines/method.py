"""What every method gets and gives: a fine-tune goes in, something that answers comes out, with its price."""

from __future__ import annotations

import abc
import functools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from safegene import models
from safegene.calibration import end_of_turn
from safegene.models import LoadedModel
from safegene.progress import Advance, Progress, silent
from safegene.training import data
from safegene.training.finetune import Row, finetune

Answer = Callable[[Sequence[str], int, Advance], list[str]]
"""Prompts, new tokens at most, told how many are done → answers."""


@dataclass(frozen=True)
class Cost:
    """What protecting one more fine-tune takes, beside loading it; what is made once per base is not in it.

    Attributes:
        examples: labelled examples that are read.
        gradient_steps: optimiser steps.
        extra_parameters: numbers that are kept beside the model's own at inference.
        extra_tokens: tokens that a request costs beside its prompt and its answer.
    """

    examples: int = 0
    gradient_steps: int = 0
    extra_parameters: int = 0
    extra_tokens: float = 0.0


@dataclass(frozen=True)
class Protected:
    """A protected fine-tune. `model` is what answers (its task loss can be measured); `answer` is how it is asked."""

    model: Any
    tokenizer: Any
    answer: Answer
    cost: Cost


@dataclass
class Setting:
    """What the methods share: the base, its adapter, an equal budget of safety data and steps, and what is made from these once.

    Attributes:
        folder: where that is kept.
        adapter: the adapter of the base, for the method that attaches it.
        examples: harmful requests with a refusal; half as many harmless ones with the base's own answer stand beside them.
        steps: optimiser steps of eight rows for a method that trains.
        judge: says whether an answer to a request is harmful (for the guard).
    """

    base: str
    folder: Path
    adapter: str = ""
    examples: int = 240
    steps: int = 45
    judge: Callable[[Sequence[str], Sequence[str]], list[bool]] | None = None
    progress: Progress = field(default=silent)

    def load(self) -> LoadedModel:
        """The base, fresh."""
        return models.load(self.base, dtype="bfloat16")

    @functools.cached_property
    def pairs(self) -> list[data.Pair]:
        """Pairs of the project's training text, as many as the budget allows."""
        return random.Random(0).sample(data.pairs(frames_per_core=1)[0], self.examples)

    @functools.cached_property
    def harmless(self) -> list[Row]:
        """Twins and ordinary requests with the base's own answers."""
        kept = self.folder / "harmless.json"
        if not kept.exists():
            some = random.Random(1).sample(list(data.ordinary()), self.examples // 4)
            questions = [p.twin for p in self.pairs[: self.examples // 4]] + some
            loaded = self.load()
            advance = self.progress("the base's own answers", len(questions))
            answers = models.generate(loaded.model, loaded.tokenizer, questions, 64, done=advance)
            rows = [{"prompt": q, "answer": a} for q, a in zip(questions, answers, strict=True) if a.strip()]
            self.folder.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        return [dict(row) for row in json.loads(kept.read_text(encoding="utf-8"))]

    @functools.cached_property
    def safety_rows(self) -> list[Row]:
        """Refusals of the harmful requests, and the harmless rows."""
        rng = random.Random(2)
        return [{"prompt": p.harmful, "answer": data.refusal(p, rng)} for p in self.pairs] + self.harmless

    def aligned(self) -> Path:
        """The base, safety-tuned in the ordinary way on `safety_rows`: the aligned half of the pair that weight-space methods need."""
        return self._made("aligned", self.base, self.safety_rows, 3 * self.steps)

    def degraded(self) -> Path:
        """`aligned` after a light fine-tune on harmless rows that begin gladly: what fine-tuning takes away."""
        glad = [{**row, "answer": "Sure! " + row["answer"]} for row in self.harmless]
        return self._made("degraded", str(self.aligned()), glad, self.steps)

    def _made(self, name: str, source: str, rows: Sequence[Row], steps: int) -> Path:
        folder = self.folder / name
        if not (folder / "config.json").exists():
            loaded = models.load(source, dtype="bfloat16")
            part = self.folder / f"{name}.part"

            def named(stage: str, total: int = 0) -> Advance:
                return self.progress(f"{name} model: {stage}", total)

            finetune(loaded.model, loaded.tokenizer, rows, part, steps=steps, progress=named)
            part.rename(folder)
        return folder


class Method(abc.ABC):
    """One way to protect a fine-tune.

    Attributes:
        name: as recipes and tables write it.
        source: where it was published.
    """

    name: ClassVar[str]
    source: ClassVar[str]

    @abc.abstractmethod
    def protect(self, loaded: LoadedModel, setting: Setting) -> Protected:
        """Protect `loaded`, which may be changed in place."""


def generated(loaded: LoadedModel, chat: Callable[[str], Any] = str) -> Answer:
    """Plain greedy generation; `chat` turns a prompt into what is asked."""

    def answer(prompts: Sequence[str], tokens: int, advance: Advance) -> list[str]:
        asked = [chat(prompt) for prompt in prompts]
        return models.generate(loaded.model, loaded.tokenizer, asked, tokens, done=advance)

    return answer


@torch.no_grad()
def last_states(loaded: LoadedModel, chats: Sequence[tuple[str, str]], layers: Sequence[int]) -> dict[int, Tensor]:
    """Raw residual at the last token of every chat (prompt, beginning of the answer), [chats, d] by layer, float32."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            found[layer].append((output[0] if isinstance(output, tuple) else output)[0, -1].float())

        return hook

    stack = models.decoder_layers(loaded.model)
    hooks = [stack[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        for prompt, begun in chats:
            ids, _ = end_of_turn(loaded.tokenizer, prompt, begun)
            loaded.model(input_ids=torch.tensor([ids], device=loaded.model.device), use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return {layer: torch.stack(states) for layer, states in found.items()}


def matrices(model: Any) -> dict[str, Tensor]:
    """The weight matrices of the decoder layers by name: what weight-space methods change. Embeddings and norms stay."""
    return {
        name: parameter.data
        for name, parameter in models.unwrap(model).named_parameters()
        if ".layers." in name and parameter.ndim == 2
    }


def difference(one: Path, other: Path) -> dict[str, Tensor]:
    """Weights of `one` minus those of `other`, float32, matrix by matrix."""
    first, second = (matrices(models.load(folder, dtype="float32").model) for folder in (one, other))
    return {name: first[name] - second[name] for name in first}
