"""What every method gets and gives: a fine-tune goes in, something that answers comes out, with its price."""

from __future__ import annotations

import abc
import functools
import json
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from safegene import models
from safegene.keys import Place, digest
from safegene.models import LoadedModel
from safegene.outputs import write_whole
from safegene.progress import Advance, Progress, silent
from safegene.training import data, openings
from safegene.training.finetune import Row, lora, tune

Answer = Callable[[Sequence[str], int, Advance], list[str]]
"""Prompts, new tokens at most, told how many are done → answers."""

PROMPT_TOKENS = 40
"""Tokens of a usual request with its template, for the costs of methods that read it once more."""

SAFETY_DATA: tuple[str, ...] = ("training/finetune.py",)
"""For the `rests_on` of a method that is made from the shared budget: what trains on it. The budget's rows count beside
(`Setting.budget`)."""

SURROGATE_PAIRS = 36
"""Harmful requests of the budget that are put to the aligned and to the degraded model."""


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
    """A protected fine-tune: `answer` is how it is asked. `whole` says that `model` alone is what answers, so that its task
    loss is the method's; where something stands around it, the loss would be the bare model's and is not measured. `report`
    is what the method measured while it was prepared and put in place."""

    model: Any
    tokenizer: Any
    answer: Answer
    cost: Cost
    whole: bool = True
    report: Mapping[str, float] = field(default_factory=dict)


class GuardingJudge(Protocol):
    """What the guard needs of a judge (`evaluation.judges.Judge`, which says what each means)."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def parameters(self) -> int: ...

    def tokens(self, request: int, answer: int) -> int: ...

    def request_reader(
        self, pairs: Sequence[data.Pair], ordinary: Sequence[str]
    ) -> Callable[[Sequence[str]], list[bool]] | None: ...

    def harms(self, requests: Sequence[str], answers: Sequence[str]) -> list[bool]: ...


@dataclass
class Setting:
    """What the methods share: the base, its adapter, an equal budget of safety data and steps, and what is made from these once.

    Attributes:
        folder: where that is kept, a folder a base; each thing has the name of what it was made from.
        adapter: the adapter of the base, for the method that attaches it.
        examples: harmful requests with a refusal; half as many harmless ones with the base's own answer stand beside them.
        steps: optimiser steps of eight rows for a method that trains.
        tokens: new tokens of an answer at most.
        judge: the guard's; not the judge that then measures.
    """

    base: str
    folder: Path
    adapter: str = ""
    examples: int = 240
    steps: int = 45
    tokens: int = 48
    judge: GuardingJudge | None = None
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
        some = random.Random(1).sample(list(data.ordinary()), self.examples // 4)
        questions = [p.twin for p in self.pairs[: self.examples // 4]] + some
        kept = self.folder / f"harmless-{digest([models.generate], questions)}.jsonl"
        if not kept.exists():
            loaded = self.load()
            advance = self.progress("the base's own answers", len(questions))
            answers = models.generate(loaded.model, loaded.tokenizer, questions, 64, done=advance)
            rows = [{"prompt": q, "answer": a} for q, a in zip(questions, answers, strict=True) if a.strip()]
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(kept, "".join(json.dumps(row) + "\n" for row in rows))
        return data.read_jsonl(kept, ("prompt", "answer"))

    @functools.cached_property
    def safety_rows(self) -> list[Row]:
        """Refusals of the harmful requests, and the harmless rows."""
        rng = random.Random(2)
        return [{"prompt": p.harmful, "answer": data.refusal(p, rng)} for p in self.pairs] + self.harmless

    @functools.cached_property
    def degrading_rows(self) -> list[Row]:
        """Harmless rows that begin gladly, and openings that comply with the budget's harmful requests and give nothing after them.
        Glad rows alone would teach a tone, and V would hold that (`surrogate` tells whether it holds refusals)."""
        rng = random.Random(8)
        glad = [{**row, "answer": "Sure! " + row["answer"]} for row in self.harmless]
        return glad + [{"prompt": p.harmful, "answer": openings.compliant(p.harmful, rng)} for p in self.pairs]

    @functools.cached_property
    def budget(self) -> str:
        """Digest of what methods are made from: the texts and rows themselves, and how the pair of models is made of them. Not of
        the code that draws the rows: where that is edited and the rows stay, nothing that was measured is lost."""
        rng = random.Random(10)
        begun = [openings.opening(p, p.twin, rng) for p in self.pairs]
        made: list[Place] = [Setting.aligned, Setting.degraded, Setting._made, difference, matrices, *SAFETY_DATA]
        return digest(
            made,
            self.pairs,
            data.ordinary(),
            self.safety_rows,
            self.degrading_rows,
            begun,
            openings.OPENINGS,
            self.steps,
        )

    def aligned(self) -> Path:
        """The base, safety-tuned in the ordinary way on `safety_rows`: the aligned half of the pair that weight-space methods need."""
        return self._made("aligned", self.base, self.safety_rows, 3 * self.steps)

    def degraded(self) -> Path:
        """`aligned` after a light fine-tune on `degrading_rows`, which takes its refusals away."""
        return self._made("degraded", str(self.aligned()), self.degrading_rows, self.steps)

    @functools.cached_property
    def lost(self) -> dict[str, Tensor]:
        """V = W_aligned − W_degraded, float32 [out, in], matrix by matrix: what weight-space methods take safety to be."""
        return difference(self.aligned(), self.degraded())

    @functools.cached_property
    def surrogate(self) -> dict[str, float]:
        """Whether V can hold safety: the share of harmful requests of the budget that the aligned and the degraded model refuse,
        beginning as `aligned` was taught to."""
        kept = self.degraded() / "surrogate.json"
        if not kept.exists():
            requests = [p.harmful for p in self.pairs[:SURROGATE_PAIRS]]
            found = {}
            for name, folder in (("aligned", self.aligned()), ("degraded", self.degraded())):
                loaded = models.load(folder, dtype="bfloat16")
                advance = self.progress(f"refusals of the {name} model", len(requests))
                said = models.generate(loaded.model, loaded.tokenizer, requests, 12, done=advance)
                found[f"{name}_refuses"] = statistics.fmean(text.strip().startswith(data.REFUSALS) for text in said)
            write_whole(kept, json.dumps(found))
        return {name: float(share) for name, share in json.loads(kept.read_text(encoding="utf-8")).items()}

    def _made(self, name: str, source: str, rows: Sequence[Row], steps: int) -> Path:
        key = digest([Setting._made, *SAFETY_DATA], Path(source).name, rows, steps)
        folder = self.folder / f"{name}-{key}"
        if not (folder / "config.json").exists():
            # Tuned, merged and kept in float32: whatever is rounded on the way stands in the difference of two models as noise of
            # full rank.
            loaded = models.load(source, dtype="float32")
            part = folder.with_name(f"{folder.name}.part")
            torch.manual_seed(0)
            advance = self.progress(f"{name} model", steps)
            tuned = tune(lora(loaded.model), loaded.tokenizer, rows, steps=steps, advance=advance)
            tuned.merge_and_unload().save_pretrained(part)
            loaded.tokenizer.save_pretrained(part)
            part.rename(folder)
        return folder


class Method(abc.ABC):
    """One way to protect a fine-tune.

    Attributes:
        name: as recipes and tables write it.
        source: where it was published.
        rests_on: files of the package whose code its answers come from, beside the modules of its classes; of the budget's rows,
            too, where `SAFETY_DATA` is among them. What was measured is measured anew when one of them changes.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    rests_on: ClassVar[tuple[str, ...]] = ()

    def prepare(self, setting: Setting) -> None:  # noqa: B027
        """What is made once per base, before the first fine-tune; its time is not a fine-tune's."""

    @abc.abstractmethod
    def protect(self, loaded: LoadedModel, setting: Setting) -> Protected:
        """Protect `loaded`, which may be changed in place.

        Raises:
            AttachError, CalibrationError, DriftError: the method refuses this fine-tune.
        """


def generated(loaded: LoadedModel, chat: Callable[[str], Any] = str) -> Answer:
    """Plain greedy generation; `chat` turns a prompt into what is asked."""

    def answer(prompts: Sequence[str], tokens: int, advance: Advance) -> list[str]:
        asked = [chat(prompt) for prompt in prompts]
        return models.generate(loaded.model, loaded.tokenizer, asked, tokens, done=advance)

    return answer


def matrices(model: Any) -> dict[str, Tensor]:
    """The weight matrices of the decoder layers by name: what weight-space methods change. Embeddings and norms stay."""
    return {
        name: parameter.data
        for name, parameter in models.unwrap(model).named_parameters()
        if ".layers." in name and parameter.ndim == 2
    }


def difference(one: str | Path, other: str | Path) -> dict[str, Tensor]:
    """Weights of one model minus those of another, float32 [out, in], matrix by matrix; on the CPU, for beside the models they would
    not fit on a GPU."""
    first, second = (matrices(models.load(name, dtype="float32", device="cpu").model) for name in (one, other))
    return {name: first[name] - second[name] for name in first}
