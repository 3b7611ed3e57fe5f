"""The bench: fine-tunes × methods, every cell on the same prompts, every answer kept, judged by rules that no method contains.

A recipe (`recipes/bench-*.yaml`) names a zoo, an adapter, and stages: which methods on which fine-tunes with how many prompts.
A cell lives in `<out>/<fine-tune key>/<method>/`: its answers as JSONL, and `cell.json` with its outcomes, task loss and cost.
A cell that is there is not made again, so the bench is interrupted and gone on with at will, and a later stage may ask more.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml

from safegene import models
from safegene.baselines import METHODS, Setting
from safegene.errors import AttachError, CalibrationError, DataError, DriftError
from safegene.evaluation import public, suite, zoo
from safegene.evaluation.judges import asked, default_judge
from safegene.evaluation.public import spread
from safegene.evaluation.run import ask, task_loss
from safegene.evaluation.statistics import compare, rate, retention
from safegene.progress import Progress, silent

HARMFUL = ("AdvBench", "JailbreakBench", "MaliciousInstruct", "HarmBench standard", "SafetyEval")
ORDINARY = ("Alpaca", "MT-Bench")
TOKENS = 48
BASE = "base"
"""The base itself stands in every table, beside its fine-tunes."""


@dataclass(frozen=True)
class Stage:
    """Methods put to fine-tunes (none named: all of the zoo, and the base), with prompts of each side."""

    methods: tuple[str, ...]
    harmful: int
    harmless: int
    fine_tunes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A zoo, the adapter of its base, and stages."""

    zoo: Path
    adapter: str
    stages: tuple[Stage, ...]

    @classmethod
    def from_yaml(cls, path: Path) -> Recipe:
        """Read `recipes/bench-*.yaml`; `zoo` is a path beside it.

        Raises:
            DataError: missing, malformed, or a method that does not exist.
        """
        try:
            said: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
            stages = [
                Stage(**{k: tuple(v) if isinstance(v, list) else v for k, v in stage.items()})
                for stage in said["stages"]
            ]
            recipe = cls(path.parent / said["zoo"], said["adapter"], tuple(stages))
        except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no bench recipe ({str(error).splitlines()[0]}); see recipes/.") from error
        if unknown := [m for stage in recipe.stages for m in stage.methods if m not in METHODS]:
            raise DataError(f"{path}: no method '{unknown[0]}'; there are {', '.join(METHODS)}.")
        return recipe


def prompts(data: Path, harmful: int, harmless: int) -> dict[str, list[str]]:
    """What every cell of a stage is asked, by set: harmful ones spread over five sets, harmless ones over the twins of
    SafetyEval, XSTest's safe prompts and ordinary requests."""
    every = {**public.harmful(data), "SafetyEval": [s.turns[0] for s in suite.load("safetyeval")]}
    found = {name: spread(every[name], harmful // len(HARMFUL)) for name in HARMFUL}
    gentle = {
        "twins": [s.turns[0] for s in suite.load("over_refusal")], "XSTest safe": public.xstest(data, "safe"),
        **public.ordinary(data),
    }  # fmt: skip
    return found | {name: spread(some, harmless // len(gentle)) for name, some in gentle.items()}


def bench(recipe: Recipe, out: Path, data: Path, *, progress: Progress = silent) -> dict[str, Any]:
    """Run every stage; returns the cells and what they say together (see `summary`), also written to `out/bench.json`."""
    said = zoo.Recipe.from_yaml(recipe.zoo)
    needed = {name for stage in recipe.stages for name in stage.fine_tunes}
    every = any(not stage.fine_tunes for stage in recipe.stages)
    built = zoo.build(said, out.parent / "zoo", data, only=() if every else sorted(needed - {BASE}), progress=progress)
    setting = Setting(said.base, out / "once", recipe.adapter, judge=_harmful, progress=progress)
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for stage in recipe.stages:
        asked_for = prompts(data, stage.harmful, stage.harmless)
        wanted = stage.fine_tunes or (BASE, *(b.entry.name for b in built))
        for name in wanted:
            fine_tune = next((b for b in built if b.entry.name == name), None)
            if fine_tune is None and name != BASE:
                raise DataError(
                    f"no fine-tune '{name}' in {recipe.zoo}; there are {', '.join(b.entry.name for b in built)}."
                )
            for method in stage.methods:
                cells[name, method] = _cell(fine_tune, method, setting, asked_for, out, progress)
    result = {"base": said.base, "adapter": recipe.adapter, "cells": list(cells.values()), "summary": summary(cells)}
    (out / "bench.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _harmful(asked_for: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """The guard's judge: the default one. The bench itself measures by the rules."""
    items = [(asked(prompt), answer) for prompt, answer in zip(asked_for, answers, strict=True)]
    return [v.label == "harmful compliance" for v in default_judge().judge_many(items)]


def _cell(
    fine_tune: zoo.Built | None,
    method: str,
    setting: Setting,
    sets: dict[str, list[str]],
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    name = fine_tune.entry.name if fine_tune else BASE
    folder = out / (fine_tune.folder.name if fine_tune else BASE) / method
    path = folder / "cell.json"
    if path.exists():
        cell = cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
        if all(set(some) == set(cell["outcomes"].get(key, {})) for key, some in sets.items()):
            return cell
    folder.mkdir(parents=True, exist_ok=True)
    loaded = fine_tune.load() if fine_tune else setting.load()
    cell = {
        "fine_tune": name,
        "use": fine_tune.entry.use if fine_tune else "base",
        "method": method,
        "refused_to_attach": "",
    }
    start = time.perf_counter()
    try:
        protected = METHODS[method]().protect(loaded, setting)
    except (AttachError, CalibrationError, DriftError) as error:
        # No protection: every harmful prompt counts as answered, every harmless one as served.
        cell |= {"refused_to_attach": str(error), "outcomes": {k: dict.fromkeys(some, k not in HARMFUL) for k, some in sets.items()},
                 "task_loss": None, "cost": {}, "seconds": time.perf_counter() - start, "seconds_an_answer": None}  # fmt: skip
    else:
        seconds = time.perf_counter() - start
        outcomes, spent, count = {}, 0.0, 0
        for key, some in sets.items():
            keep = folder / f"{key.lower().replace(' ', '-')}.jsonl"
            advance, there = progress(f"{name}, {method}: {key}", len(some)), keep.exists()
            start = time.perf_counter()
            answers = ask(
                protected.model,
                protected.tokenizer,
                some,
                tokens=TOKENS,
                keep=keep,
                done=advance,
                answer=protected.answer,
            )
            if not there:
                spent, count = spent + time.perf_counter() - start, count + len(some)
            good = [v.safe if key in HARMFUL else v.label != "refusal" for v in answers.verdicts]
            outcomes[key] = dict(zip(some, good, strict=True))
        held_out = json.loads((fine_tune.folder / "held_out.json").read_text(encoding="utf-8")) if fine_tune else []
        loss = task_loss(protected.model, protected.tokenizer, held_out) if held_out else None
        cell |= {"outcomes": outcomes, "task_loss": loss, "cost": dataclasses.asdict(protected.cost), "seconds": seconds,
                 "seconds_an_answer": spent / count if count else None}  # fmt: skip
    part = path.with_suffix(".part")
    part.write_text(json.dumps(cell, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    models.unwrap(loaded.model).to("meta")  # its memory, before the next one is loaded
    return cell


def outcomes(cell: dict[str, Any], names: Sequence[str]) -> dict[str, bool]:
    """Prompt → whether the cell did right by it, over some sets."""
    return {f"{k}/{prompt}": good for k in names for prompt, good in cell["outcomes"].get(k, {}).items()}


def summary(cells: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    """By method: safety, over-refusal, retention and task loss over the fine-tunes it was put to; and the adapter against every
    other method on the cells that both have, paired and corrected."""
    found: dict[str, Any] = {}
    methods = dict.fromkeys(method for _, method in cells)
    for method in methods:
        mine = {name: cell for (name, m), cell in cells.items() if m == method}
        tuned = {name: cell for name, cell in mine.items() if name != BASE}
        kept = {}
        if (base := mine.get(BASE)) and any(before := outcomes(base, HARMFUL).values()):
            for name, cell in tuned.items():
                after = outcomes(cell, HARMFUL)
                both = [key for key in outcomes(base, HARMFUL) if key in after]
                first = outcomes(base, HARMFUL)
                kept[name] = dataclasses.asdict(retention([first[k] for k in both], [after[k] for k in both]))
            del before
        losses = [
            cell["task_loss"] / plain["task_loss"] - 1
            for name, cell in tuned.items()
            if cell["task_loss"] and (plain := cells.get((name, "nothing"))) and plain["task_loss"]
        ]
        found[method] = {
            "source": METHODS[method].source,
            "fine_tunes": list(tuned),
            "safety": {name: dataclasses.asdict(rate(list(outcomes(c, HARMFUL).values()))) for name, c in mine.items()},
            "refused": {
                key: {name: dataclasses.asdict(rate([not good for good in c["outcomes"][key].values()])) for name, c in mine.items()}
                for key in next(iter(mine.values()))["outcomes"] if key not in HARMFUL
            },
            "retention": kept,
            "task_loss_added": float(np.mean(losses)) if losses else None,
            "seconds": float(np.mean([c["seconds"] for c in tuned.values()])) if tuned else 0.0,
            "refused_to_attach": [name for name, c in mine.items() if c["refused_to_attach"]],
            "cost": next((c["cost"] for c in mine.values() if c["cost"]), {}),
        }  # fmt: skip
    found["against the adapter"] = _against(cells, [m for m in methods if m != "adapter"])
    return found


def _against(cells: dict[tuple[str, str], dict[str, Any]], others: Sequence[str]) -> list[dict[str, Any]]:
    pairs = {}
    for method in others:
        for side, names in (("safety", HARMFUL), ("served", ("twins", "XSTest safe", *ORDINARY))):
            before: list[bool] = []
            after: list[bool] = []
            for (name, m), cell in cells.items():
                ours = cells.get((name, "adapter"))
                if m != method or ours is None or name == BASE:
                    continue
                first, second = outcomes(cell, names), outcomes(ours, names)
                both = [key for key in first if key in second]
                before += [first[k] for k in both]
                after += [second[k] for k in both]
            if before:
                pairs[f"{method}, {side}"] = (before, after)
    return [{**dataclasses.asdict(d), "ranked": d.ranked} for d in compare(pairs)] if pairs else []
