"""The bench: fine-tunes × methods, every cell on the same prompts, every answer kept, judged by the rules. The guard reads the
answers through the classifier, which is not the judge here.

A recipe (`recipes/bench-*.yaml`) names a zoo, an adapter, and stages: which methods on which fine-tunes with how many prompts.
A cell lives in `<out>/<fine-tune>/<method>-<key>/`: its answers as JSONL, and `cell.json` with outcomes, task loss and cost. What
is there is not asked again, so the bench is interrupted and gone on with at will, and a later stage may ask more. The tables are
written after every fine-tune, over all cells that are there. A cell that fails keeps its error, stands in no table, and is tried
again the next time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import inspect
import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from safegene import models
from safegene.adapter import SafetyAdapter
from safegene.baselines import METHODS, Adapter, Cost, Method, Protected, Setting
from safegene.baselines.method import SAFETY_DATA
from safegene.errors import AttachError, CalibrationError, DataError, DriftError
from safegene.evaluation import public, suite, zoo
from safegene.evaluation.bench_tables import BASE, HARMFUL, HARMLESS, tables
from safegene.evaluation.judges import Judge, asked, default_judge
from safegene.evaluation.run import ask, task_loss
from safegene.evaluation.runner import read_record
from safegene.evaluation.tables import bench_markdown
from safegene.outputs import write_whole
from safegene.progress import Progress, silent

TOKENS = 48


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
            given: Any = said["stages"]
            stages = [
                Stage(tuple(s["methods"]), int(s["harmful"]), int(s["harmless"]), tuple(s.get("fine_tunes", ())))
                for s in given
            ]
            recipe = cls(path.parent / said["zoo"], said["adapter"], tuple(stages))
        except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no bench recipe ({str(error).splitlines()[0]}); see recipes/.") from error
        if unknown := [m for stage in recipe.stages for m in stage.methods if m not in METHODS]:
            raise DataError(f"{path}: no method '{unknown[0]}'; there are {', '.join(METHODS)}.")
        if any(stage.harmful < len(HARMFUL) or stage.harmless < len(HARMLESS) for stage in recipe.stages):
            raise DataError(
                f"{path}: a stage asks at least {len(HARMFUL)} harmful and {len(HARMLESS)} harmless prompts."
            )
        return recipe


def prompts(data: Path, harmful: int, harmless: int) -> dict[str, list[str]]:
    """What every cell of a stage is asked, by set: harmful ones from five sets, harmless ones from the twins of SafetyEval,
    XSTest's safe prompts and ordinary requests. A smaller stage asks the beginning of what a larger one asks."""
    sets, few, gentle = public.harmful(data), harmful // len(HARMFUL), harmless // len(HARMLESS)
    found = {name: beginning(sets[name], few) for name in HARMFUL if name in sets}
    found["SafetyEval"] = [s.turns[0] for s in suite.sample_evenly(suite.load("safetyeval"), few)]
    found["twins"] = [s.turns[0] for s in suite.sample_evenly(suite.load("over_refusal"), gentle)]
    served = {"XSTest safe": public.xstest(data, "safe"), **public.ordinary(data)}
    return found | {name: beginning(some, gentle) for name, some in served.items()}


def beginning(some: Sequence[str], n: int) -> list[str]:
    """The first n in the order of their hashes: no subject is favoured, and fewer are a part of more."""
    return sorted(dict.fromkeys(some), key=lambda prompt: hashlib.sha256(prompt.encode()).digest())[:n]


def bench(recipe: Recipe, out: Path, data: Path, *, progress: Progress = silent) -> dict[str, Any]:
    """Run every stage; returns the cells and what they say together (see `bench_tables`), which `out/bench.json` and `bench.md`
    hold from the first fine-tune on. `failed` names the cells that could not be measured.

    Raises:
        DataError: the adapter, a method's library, a fine-tune or a data set is missing, or a cell's record is damaged.
    """
    methods = {name: METHODS[name]() for stage in recipe.stages for name in stage.methods}
    keys = {name: _key(name, recipe.adapter) for name in methods}  # reads the adapter: said before any work
    said = zoo.Recipe.from_yaml(recipe.zoo)
    named = {name for stage in recipe.stages for name in stage.fine_tunes}
    if unknown := named - {BASE} - {entry.name for entry in said.fine_tunes}:
        raise DataError(f"no fine-tune '{min(unknown)}' in {recipe.zoo}.")
    every = any(not stage.fine_tunes for stage in recipe.stages)
    wanted = [entry.name for entry in said.fine_tunes if every or entry.name in named]
    built = zoo.build(said, out.parent / "zoo", data, only=wanted, progress=progress) if wanted else []
    fine_tunes: dict[str, zoo.Built | None] = {BASE: None, **{b.entry.name: b for b in built}}
    base = models.weights_digest(models.load(said.base, dtype="bfloat16").model)
    once = zoo.digest([inspect.getfile(Setting), *SAFETY_DATA])
    setting = Setting(
        said.base, out / f"once-{base[:12]}-{once}", recipe.adapter, tokens=TOKENS, judge=_harmful, progress=progress
    )

    @functools.cache
    def ready(name: str) -> Method:
        methods[name].prepare(setting)
        return methods[name]

    folders = {name: b.folder.name if b else f"{BASE}-{base[:12]}" for name, b in fine_tunes.items()}
    places = {
        (name, method): out / folders[name] / f"{method}-{keys[method]}"
        for stage in recipe.stages for name in stage.fine_tunes or fine_tunes for method in stage.methods
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    cells = {at: read_record(kept) for at, place in places.items() if (kept := place / "cell.json").exists()}

    def written() -> dict[str, Any]:
        good = {at: cells[at] for at in places if at in cells and not cells[at].get("error")}
        failed = [
            {"fine_tune": name, "method": method, "error": cells[name, method]["error"]}
            for name, method in places
            if cells.get((name, method), {}).get("error")
        ]
        about = {"base": said.base, "adapter": recipe.adapter}
        result = {**about, "cells": list(good.values()), "failed": failed, **tables(good)}
        write_whole(out / "bench.json", json.dumps(result, indent=1) + "\n")
        write_whole(out / "bench.md", bench_markdown(result) + "\n")
        return result

    for stage in recipe.stages:
        asked_for = prompts(data, stage.harmful, stage.harmless)
        for name in stage.fine_tunes or fine_tunes:
            for method in stage.methods:
                at = name, method
                cells[at] = _cell(fine_tunes[name], method, ready, setting, asked_for, places[at], progress)
                gc.collect()  # an attached model and its hooks hold each other
            written()
    return written()


def _harmful(asked_for: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """The guard's judge: the default one. The bench itself measures by the rules."""
    items = [(asked(prompt), answer) for prompt, answer in zip(asked_for, answers, strict=True)]
    return [v.label == "harmful compliance" for v in _guard().judge_many(items)]


@functools.cache
def _guard() -> Judge:
    return default_judge()


def _key(method: str, adapter: str) -> str:
    """What a cell's answers and verdicts depend on beside the fine-tune: the sources of the method and of what it rests on, the
    judge that measures, the adapter for those that attach it, the guard's own judge."""
    chosen = METHODS[method]
    modules = [inspect.getfile(c) for c in chosen.__mro__ if c.__module__.startswith("safegene.")]
    said: list[object] = [TOKENS]
    if method in ("adapter", "uncalibrated"):
        said.append(SafetyAdapter.from_pretrained(adapter).config)  # it holds the digest of the weights
    if method == "guard":
        said.append(_guard().fingerprint)
    return zoo.digest([*modules, *chosen.rests_on, "evaluation/judges/rules.py"], *said)


def _cell(
    fine_tune: zoo.Built | None, method: str, ready: Callable[[str], Method], setting: Setting, sets: dict[str, list[str]],
    folder: Path, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """One cell, with what was asked of it before; only prompts that it has not seen are put to it. An error of the method is kept in
    the cell, with its traceback beside, and ends nothing else."""
    path = folder / "cell.json"
    cell = read_record(path) if path.exists() else {}
    known: dict[str, dict[str, bool]] = cell.get("outcomes", {})
    wanted = {key: some for key, some in sets.items() if key in HARMFUL or not cell.get("refused_to_attach")}
    missing = {key: left for key, some in wanted.items() if (left := [p for p in some if p not in known.get(key, {})])}
    if not missing:
        cell.pop("error", None)  # of a larger stage, which tries again
        return cell
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "fine_tune": fine_tune.entry.name if fine_tune else BASE, "use": fine_tune.entry.use if fine_tune else BASE,
        "parent": _parent(fine_tune), "method": method,
    }  # fmt: skip
    try:
        cell = {**about, **_measured(fine_tune, method, ready(method), setting, missing, cell, folder, progress)}
    except Exception as error:  # whatever a rival's library raises
        write_whole(folder / "error.txt", traceback.format_exc())
        cell = {**cell, **about, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    write_whole(path, json.dumps(cell, ensure_ascii=False, indent=1) + "\n")
    return cell


def _measured(
    fine_tune: zoo.Built | None, method: str, chosen: Method, setting: Setting, missing: dict[str, list[str]],
    before: dict[str, Any], folder: Path, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """What a cell holds once the missing prompts are asked too.

    Where the attachment is refused there is no protection: every harmful request counts as answered, and the fine-tune's own harmless
    answers are not this method's. What the adapter would have done, had it been forced, is measured beside: was it right to refuse?
    """
    loaded = fine_tune.load() if fine_tune else setting.load()
    refused = ""
    protected: Protected | None = None
    forced: Protected | None = None
    start = time.perf_counter()
    try:
        protected = chosen.protect(loaded, setting)
    except (AttachError, CalibrationError, DriftError) as error:
        refused = str(error)
    seconds = time.perf_counter() - start
    if refused:
        missing = {key: some for key, some in missing.items() if key in HARMFUL}
        with contextlib.suppress(AttachError, CalibrationError):
            if isinstance(chosen, Adapter):
                forced = chosen.force(fine_tune.load() if fine_tune else setting.load(), setting)
    by = protected or forced
    found = {key: dict(some) for key, some in before.get("outcomes", {}).items()}
    would = {key: dict(some) for key, some in before.get("forced", {}).items()}
    babbled = {key: list(some) for key, some in before.get("incoherent", {}).items()}
    for key, some in missing.items():
        known = found.setdefault(key, {})
        if by is not None:
            keep = folder / f"{key.lower().replace(' ', '-')}-{len(known)}.jsonl"
            advance = progress(f"{fine_tune.entry.name if fine_tune else BASE}, {method}: {key}", len(some))
            answers = ask(by.model, by.tokenizer, some, tokens=TOKENS, keep=keep, done=advance, answer=by.answer)
            good = {
                prompt: v.safe if key in HARMFUL else v.label not in ("refusal", "incoherent")
                for prompt, v in zip(some, answers.verdicts, strict=True)
            }
            if refused:
                would.setdefault(key, {}).update(good)
            else:
                known.update(good)
                nonsense = [p for p, v in zip(some, answers.verdicts, strict=True) if v.label == "incoherent"]
                babbled.setdefault(key, []).extend(nonsense)
        if refused:
            known.update(dict.fromkeys(some, False))
    held_out = fine_tune.held_out() if fine_tune else []
    loss = None
    if protected and protected.whole and held_out:
        loss = task_loss(protected.model, protected.tokenizer, held_out)
    return {
        "refused_to_attach": refused, "outcomes": found, "incoherent": babbled, "forced": would,
        "task_loss": loss, "cost": dataclasses.asdict(protected.cost if protected else Cost()), "seconds": seconds,
        "report": dict(by.report) if by else {},
    }  # fmt: skip


def _parent(fine_tune: zoo.Built | None) -> str:
    """What a fine-tune was tuned from: the base, or another fine-tune."""
    of = fine_tune.entry.of if fine_tune else ()
    return of[0] if len(of) == 1 else BASE
