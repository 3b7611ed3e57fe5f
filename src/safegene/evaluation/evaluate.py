"""One model, with or without an adapter, through suites: load, arm, ask, judge, count."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safegene import models
from safegene.adapter import SafetyAdapter
from safegene.attach import Handle, attach
from safegene.errors import DataError
from safegene.evaluation import judges, public_suites, runner, scores, suite, wrappers
from safegene.evaluation.core import openings
from safegene.evaluation.judges import Judge
from safegene.evaluation.suite import Sample
from safegene.progress import Progress, silent

RECORD = ("model", "adapter", "content", "tokens", "decoding", "dtype")
"""Of a run's record: what its figures are printed with."""


def samples_of(name: str, data: str | None) -> list[Sample]:
    """Samples of one of the project's suites, or of a public set.

    Raises:
        DataError: no such suite, or a public one without `data`.
    """
    if name in public_suites.PUBLIC:
        if data is None:
            hub = public_suites.PUBLIC[name].hub
            like = f", such as --data {name}={hub}" if hub else ""
            raise DataError(f"{name} is a public set; give its folder, file or hub id with --data{like}.")
        return public_suites.load(name, data)
    return suite.load(name)


def _figures(name: str, judged: list[runner.Judged], about: dict[str, Any], folder: Path) -> dict[str, Any]:
    path = folder / "gate.json"
    gate = runner.read_record(path) if path.exists() else {}
    # The gate was read on first turns; where harm begins later, that says nothing about harmful requests.
    innocent = {j.sample.id for j in judged if j.sample.harmful and j.sample.harmful_from > 0}
    outcomes = [
        {"id": o.id, "harmful": o.harmful, "ok": o.ok, "coherent": o.coherent}
        | ({"gate": gate[o.id]} if o.id in gate and o.id not in innocent else {})
        for o in scores.outcomes(judged)
    ]
    return {
        **asdict(scores.score(name, judged)), **{k: about.get(k) for k in ("asked", "n", "data", "wrap")},
        "by_rules": sum(j.verdict.by_rules for j in judged), "outcomes": outcomes, "worst": scores.worst(judged),
    }  # fmt: skip


def _gate_scores(handle: Handle, tokenizer: Any, samples: Sequence[Sample], path: Path, progress: Progress) -> None:
    """Highest (s − τ) / w of every first turn, by id, in `path`."""
    if path.exists():
        return
    progress("reading the gate")
    read = openings(handle, tokenizer, [s.turns[0] for s in samples])
    runner.replace_text(path, json.dumps({s.id: float(g.max()) for s, g in zip(samples, read, strict=True)}))


def rejudge(out: Path, judge: Judge, progress: Progress = silent) -> dict[str, Any]:
    """Judge the kept answers of a run (the folder given to `evaluate`) again; writes what `evaluate` does, and returns it with the
    names of the suites that were left out because they were stopped before their end, as `unfinished`.

    Raises:
        DataError: no run is there, or one of another version; one of its suites is of another run, or none is finished.
    """
    folders = sorted(f.parent for f in out.glob("*/run.json"))
    if not folders or not (out / "run.json").exists():
        raise DataError(f"{out} holds no run; give the --out of safegene eval, or a JSONL file of answers.")
    about = runner.read_record(out / "run.json")
    if lacking := [k for k in RECORD if k not in about]:
        raise DataError(f"{out} is of another version (its record has no '{lacking[0]}'); judge it with that version.")
    found: dict[str, Any] = {}
    unfinished: list[str] = []
    for folder in folders:
        try:
            suite_record, samples, answers = runner.kept(folder)
        except runner.UnfinishedError as error:
            if len(unfinished) + 1 == len(folders):
                raise DataError(f"{out} holds no finished suite: {error}") from error
            unfinished.append(folder.name)
            continue
        if differs := [k for k in about if suite_record.get(k) != about[k]]:
            raise DataError(f"{folder} is of another run than {out} ({', '.join(differs)} differ); remove it.")
        judged = runner.judge(samples, answers, judge, folder, progress)
        found[folder.name] = _figures(folder.name, judged, suite_record, folder)
    return {**_write(out, about, judge, found), "unfinished": unfinished}


def _write(out: Path, about: dict[str, Any], judge: Judge, found: dict[str, Any]) -> dict[str, Any]:
    """Figures of this judge, beside those of suites that it judged in this folder before."""
    path = out / f"scores-{judge.name}.json"
    before = runner.read_record(path) if path.exists() else {}
    kept = before.get("suites", {}) if before.get("fingerprint") == judge.fingerprint else {}
    result = {
        **about,
        "judge": judge.name,
        "judge_asked_as": judge.asked_as,
        "fingerprint": judge.fingerprint,
        "suites": {**kept, **found},
    }
    runner.replace_text(path, json.dumps(result, indent=1) + "\n")
    return result


def evaluate(
    model: str, suites: Sequence[str], out: Path, *, judge: Judge | str, adapter: str = "",
    data: str | Mapping[str, str] | None = None, n: int = 0, wrap: int | None = None, tokens: int = runner.TOKENS, dtype: str = "bfloat16",
    progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """Measure `model` on `suites`; texts and figures go to `out`, one folder a suite, and a run that was stopped goes on.

    Args:
        judge: a judge, or its name: then it is loaded once the suites are read, so that a wrong suite costs no download.
        adapter: folder, shipped name or hub id; "" measures the model alone.
        data: where the public sets are (folder, file or hub id): one place for all, or one a suite as `public_suites.places` gives.
        n: samples of a suite at most (see `suite.sample_evenly`); 0 takes all.
        wrap: put so many requests of every suite (0: all) into every jailbreak wrapper; the suites are called NAME-wrapped then.
        tokens: new tokens of an answer at most.

    Returns:
        what `scores-<judge>.json` holds: the record of the run and the figures of every suite.

    Raises:
        AttachError: the adapter could not be armed; nothing is measured then.
        DataError: no such suite or judge, a suite that cannot be wrapped, or `out` holds another run.
    """
    places = {"": data} if isinstance(data, str) else dict(data or {})
    where = {name: places.get(name, places.get("")) if name in public_suites.PUBLIC else None for name in suites}
    chosen = {}  # before any work is done
    for name in suites:
        samples = samples_of(name, where[name])
        chosen[name] = suite.sample_evenly(samples if wrap is None else wrappers.around(samples, wrap), n)
    judge = judges.load(judge) if isinstance(judge, str) else judge
    progress(f"loading {model}")
    loaded = models.load(model, dtype=dtype)
    armed: Handle | None = None
    adapter_digest, calibration = "", {}
    if adapter:
        gene = SafetyAdapter.from_pretrained(adapter)
        armed = attach(loaded.model, gene, tokenizer=loaded.tokenizer)
        settings = json.dumps(asdict(gene.config), sort_keys=True, default=str)
        adapter_digest = hashlib.sha256((gene.config.weights_sha256 + settings).encode()).hexdigest()
        calibration = {"threshold": armed.calibration.threshold, "strength": armed.calibration.strength}
    about = runner.model_record(
        model, loaded.model, tokens=tokens, adapter_name=adapter, adapter=adapter_digest, calibration=calibration
    )
    runner.claim(out, about)
    found: dict[str, Any] = {}
    for name, samples in chosen.items():
        called = name if wrap is None else f"{name}-wrapped"
        folder, of_suite = out / called, runner.record(about, name, samples, n, where[name], wrap)
        answers = runner.generate(
            loaded.model, loaded.tokenizer, samples, folder, of_suite, tokens=tokens, progress=progress
        )
        judged = runner.judge(samples, answers, judge, folder, progress)
        if armed is not None:
            _gate_scores(armed, loaded.tokenizer, samples, folder / "gate.json", progress)
        found[called] = _figures(called, judged, of_suite, folder)
    return _write(out, about, judge, found)
