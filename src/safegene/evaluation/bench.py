"""The bench: fine-tunes × methods, every cell on the same prompts, every answer kept, judged by the rules. The guard reads
requests and answers through a judge of its own, which is not the judge here.

A recipe (`recipes/bench-*.yaml`) names a zoo, an adapter, and stages: which methods on which fine-tunes with how many prompts.
A cell lives in `<out>/<fine-tune>-<weights>/<method>-<key>/`: its answers as JSONL, and `cell.json` with outcomes, task loss,
capability and cost. What is there is not asked again, so the bench is interrupted and gone on with at will, and a later stage may
ask more; when the rules change, kept answers are judged anew. The tables are written after every fine-tune, over all cells that
are there. A cell that fails keeps its error, stands in no table, and is tried again the next time.
"""

from __future__ import annotations

import contextlib
import copy
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
from safegene.attach import attach
from safegene.baselines import METHODS, Adapter, Cost, Method, Protected, Setting
from safegene.baselines.method import SAFETY_DATA, generated
from safegene.errors import AttachError, CalibrationError, DataError, DriftError
from safegene.evaluation import capability, judges, public, suite, zoo
from safegene.evaluation.bench_tables import BASE, HARMFUL, HARMLESS, tables
from safegene.evaluation.capability import Question
from safegene.evaluation.overhead import overheads
from safegene.evaluation.run import JUDGED_BY, Answers, ask, judged_again, task_loss
from safegene.evaluation.runner import read_record
from safegene.evaluation.tables import bench_markdown
from safegene.keys import digest
from safegene.outputs import write_whole
from safegene.progress import Advance, Progress, silent

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
    """A zoo, the adapter of its base, stages, and the judge that the guard reads with (`judges.GUARDS`, or NAME=FOLDER)."""

    zoo: Path
    adapter: str
    stages: tuple[Stage, ...]
    guard: str = "default"

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
            guard = str(said.get("guard", cls.guard))
            recipe = cls(path.parent / said["zoo"], said["adapter"], tuple(stages), guard)
        except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no bench recipe ({str(error).splitlines()[0]}); see recipes/.") from error
        if unknown := [m for stage in recipe.stages for m in stage.methods if m not in METHODS]:
            raise DataError(f"{path}: no method '{unknown[0]}'; there are {', '.join(METHODS)}.")
        if guard.partition("=")[0] not in judges.GUARDS:
            raise DataError(f"{path}: '{guard}' is no guard; there are {', '.join(judges.GUARDS)}, or NAME=FOLDER.")
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
    said = zoo.Recipe.from_yaml(recipe.zoo)
    named = {name for stage in recipe.stages for name in stage.fine_tunes}
    if unknown := named - {BASE} - {entry.name for entry in said.fine_tunes}:
        raise DataError(f"no fine-tune '{min(unknown)}' in {recipe.zoo}.")
    base = models.weights_digest(models.load(said.base, dtype="bfloat16").model)
    judge = judges.load(recipe.guard) if "guard" in methods else None
    setting = Setting(
        said.base, out / f"once-{base[:12]}", recipe.adapter, tokens=TOKENS, judge=judge, progress=progress
    )
    keys = {name: _key(name, setting) for name in methods}  # reads the adapter: said before any fine-tune is made
    questions = capability.questions(data)
    if absent := [name for name in capability.SETS if name not in questions]:
        progress(f"not asked, because {data} does not hold it: {', '.join(absent)}")
    every = any(not stage.fine_tunes for stage in recipe.stages)
    wanted = [entry.name for entry in said.fine_tunes if every or entry.name in named]
    built = zoo.build(said, out.parent / "zoo", data, only=wanted, progress=progress) if wanted else []
    fine_tunes: dict[str, zoo.Built | None] = {BASE: None, **{b.entry.name: b for b in built}}

    @functools.cache
    def ready(name: str) -> Method:
        methods[name].prepare(setting)
        return methods[name]

    # Built anew, a fine-tune may have the same key and other weights.
    folders = {
        n: f"{b.folder.name}-{b.record['weights'][:12]}" if b else f"{BASE}-{base[:12]}" for n, b in fine_tunes.items()
    }
    places = {
        (name, method): out / folders[name] / f"{method}-{keys[method]}"
        for stage in recipe.stages for name in stage.fine_tunes or fine_tunes for method in stage.methods
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    cells = {at: _kept(place) for at, place in places.items() if (place / "cell.json").exists()}

    timed: dict[str, Any] = {}

    def written() -> dict[str, Any]:
        good = {at: cells[at] for at in places if at in cells and not cells[at].get("error")}
        failed = [
            {"fine_tune": name, "method": method, "error": cells[name, method]["error"]}
            for name, method in places
            if cells.get((name, method), {}).get("error")
        ]
        about = {
            "base": said.base, "adapter": recipe.adapter, "guard": recipe.guard, "absent": absent, "overhead": timed,
        }  # fmt: skip
        result = {**about, "cells": list(good.values()), "failed": failed, **tables(good)}
        write_whole(out / "bench.json", json.dumps(result, indent=1) + "\n")
        write_whole(out / "bench.md", bench_markdown(result) + "\n")
        return result

    for stage in recipe.stages:
        asked_for = prompts(data, stage.harmful, stage.harmless)
        for name in stage.fine_tunes or fine_tunes:
            for method in stage.methods:
                at = name, method
                cells[at] = _cell(fine_tunes[name], method, ready, setting, asked_for, questions, places[at], progress)
                gc.collect()  # an attached model and its hooks hold each other
            written()
    if "adapter" in methods:
        timed |= _overhead(setting)
    return written()


def _overhead(setting: Setting) -> dict[str, Any]:
    """What the adapter costs in time on the base, by pass (see `overhead.overheads`); measured once."""
    gene = SafetyAdapter.from_pretrained(setting.adapter)
    path = setting.folder / f"overhead-{digest(['evaluation/overhead.py'], gene.config)}.json"
    if not path.exists():
        loaded = setting.load()
        handle = attach(loaded.model, gene)  # with the base's own thresholds: it is the base
        found = overheads(loaded.model, handle, loaded.tokenizer, progress=setting.progress)
        setting.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({name: dataclasses.asdict(o) for name, o in found.items()}, indent=1) + "\n")
    return read_record(path)


def _key(method: str, setting: Setting) -> str:
    """What a cell's answers depend on beside the fine-tune: the code of the method and of what it rests on, the rows of those that
    are made from the budget, the adapter for those that attach it, the guard's own judge. Not the judge that measures: it reads
    what is kept."""
    chosen = METHODS[method]
    modules = [inspect.getfile(c) for c in chosen.__mro__ if c.__module__.startswith("safegene.") and c is not Method]
    said: list[object] = [TOKENS]
    if method in ("adapter", "uncalibrated"):
        said.append(SafetyAdapter.from_pretrained(setting.adapter).config)  # it holds the digest of the weights
    if method == "guard" and setting.judge:
        said.append(setting.judge.fingerprint)
    if set(SAFETY_DATA) <= set(chosen.rests_on):
        said.append(setting.budget)
    return digest([*modules, *chosen.rests_on, generated, models.generate], *said)


def _kept(folder: Path) -> dict[str, Any]:
    """A cell that is there, by the verdicts of today's judge: where they are another's, its answers are judged anew.

    Raises:
        DataError: it is damaged, or answers that it counts are gone.
    """
    path = folder / "cell.json"
    cell = read_record(path)
    if cell.get("judge") == JUDGED_BY:
        return cell
    side = "forced" if cell.get("refused_to_attach") else "outcomes"
    anew = {**cell, "judge": JUDGED_BY, side: {}, "incoherent": {}}
    for key, before in cell.get(side, {}).items():
        for answers in sorted(folder.glob(f"{_file(key)}-*.jsonl")):
            _tell(anew, key, judged_again(answers))
        if gone := before.keys() - anew[side].get(key, {}).keys():
            raise DataError(f"{folder} lacks {len(gone)} answers of {key}; remove it and run again.")
    write_whole(path, json.dumps(anew, ensure_ascii=False, indent=1) + "\n")
    return anew


def _tell(cell: dict[str, Any], key: str, answers: Answers) -> None:
    """Put the verdicts on answers of one set into a cell: what a refused attachment would have done stands apart."""
    both = list(zip(answers.prompts, answers.verdicts, strict=True))
    good = {p: v.safe if key in HARMFUL else v.label not in ("refusal", "incoherent") for p, v in both}
    cell["forced" if cell["refused_to_attach"] else "outcomes"].setdefault(key, {}).update(good)
    if not cell["refused_to_attach"]:
        cell["incoherent"].setdefault(key, []).extend(p for p, v in both if v.label == "incoherent")


def _file(key: str) -> str:
    return key.lower().replace(" ", "-")


def _cell(
    fine_tune: zoo.Built | None, method: str, ready: Callable[[str], Method], setting: Setting, sets: dict[str, list[str]],
    questions: dict[str, list[Question]], folder: Path, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """One cell, with what was asked of it before; only prompts that it has not seen are put to it, and the questions where it was asked
    others. An error of the method is kept in the cell, with its traceback beside, and ends nothing else."""
    path = folder / "cell.json"
    cell = _kept(folder) if path.exists() else {}
    known: dict[str, dict[str, bool]] = cell.get("outcomes", {})
    wanted = {key: some for key, some in sets.items() if key in HARMFUL or not cell.get("refused_to_attach")}
    missing = {key: left for key, some in wanted.items() if (left := [p for p in some if p not in known.get(key, {})])}
    able_by = digest(["evaluation/capability.py"], questions)
    new = questions if cell.get("able_by") != able_by else None
    if not missing and new is None:
        cell.pop("error", None)  # of a larger stage, which tries again
        return cell
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "fine_tune": fine_tune.entry.name if fine_tune else BASE, "use": fine_tune.entry.use if fine_tune else BASE,
        "parent": _parent(fine_tune), "method": method,
    }  # fmt: skip
    try:
        cell = _measured(fine_tune, method, ready(method), setting, missing, new, cell, folder, progress)
        cell = {**about, **cell, "able_by": able_by}
    except Exception as error:  # whatever a rival's library raises
        write_whole(folder / "error.txt", traceback.format_exc())
        cell = {**cell, **about, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    write_whole(path, json.dumps(cell, ensure_ascii=False, indent=1) + "\n")
    return cell


def _measured(
    fine_tune: zoo.Built | None, method: str, chosen: Method, setting: Setting, missing: dict[str, list[str]],
    questions: dict[str, list[Question]] | None, before: dict[str, Any], folder: Path, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """What a cell holds once the missing prompts are asked too, and `questions`, where it was not asked these.

    Where the attachment is refused there is no protection: every harmful request counts as answered, and the fine-tune's own harmless
    answers are not this method's. What the adapter would have done, had it been forced, is measured beside: was it right to refuse?
    """

    def named(stage: str, total: int = 0) -> Advance:
        return progress(f"{fine_tune.entry.name if fine_tune else BASE}, {method}: {stage}", total)

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
    cell: dict[str, Any] = {"refused_to_attach": refused, "judge": JUDGED_BY}
    cell |= {part: copy.deepcopy(before.get(part, {})) for part in ("outcomes", "incoherent", "forced")}
    for key, some in missing.items():
        known = cell["outcomes"].setdefault(key, {})
        if by is not None:
            keep = folder / f"{_file(key)}-{len(known)}.jsonl"
            done = named(key, len(some))
            answers = ask(by.model, by.tokenizer, some, tokens=TOKENS, keep=keep, done=done, answer=by.answer)
            _tell(cell, key, answers)
        if refused:
            known.update(dict.fromkeys(some, False))
    held_out = fine_tune.held_out() if fine_tune else []
    loss = None
    if protected and protected.whole and held_out:
        loss = task_loss(protected.model, protected.tokenizer, held_out)
    able = before.get("capability", {})
    if questions is not None:
        able = capability.measured(protected, questions, held_out, folder, named) if protected else {}
    return cell | {
        "task_loss": loss, "capability": able, "cost": dataclasses.asdict(protected.cost if protected else Cost()), "seconds": seconds,
        "report": dict(by.report) if by else {},
    }  # fmt: skip


def _parent(fine_tune: zoo.Built | None) -> str:
    """What a fine-tune was tuned from: the base, or another fine-tune."""
    of = fine_tune.entry.of if fine_tune else ()
    return of[0] if len(of) == 1 else BASE
