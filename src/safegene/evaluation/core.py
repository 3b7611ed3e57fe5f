"""The core results: one adapter on its base and on six fine-tunes, from public data sets, every text kept.

Each variant's answers go to `out/<variant>/plain/` and `out/<variant>/<adapter digest>/` as JSONL; what stands there is
not generated again, so an interrupted run goes on where it stopped. `out/run.json` says of which base they are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from safegene import models
from safegene.adapter import SafetyAdapter
from safegene.attach import Handle, attach
from safegene.calibration import Calibration
from safegene.errors import DriftError
from safegene.evaluation import fine_tunes, public, runner
from safegene.evaluation.demo import HELD_OUT, VERTICALS, vertical
from safegene.evaluation.judges.rules import SUPPORT
from safegene.evaluation.overhead import PAIRS, overheads
from safegene.evaluation.plots import core_svg
from safegene.evaluation.public import spread
from safegene.evaluation.run import Answers, ask, task_loss
from safegene.evaluation.statistics import paired_p, rate, retention
from safegene.features import end_of_turn
from safegene.progress import Progress, silent
from safegene.training.data import fingerprint, pairs
from safegene.training.finetune import Row, collate, finetune

FIGURE_SETS = ("AdvBench", "JailbreakBench", "MaliciousInstruct", "HarmBench standard")
BESIDE = ("HarmBench contextual", "HarmBench copyright", "TDC2023")
TRANSFER_SETS = ("AdvBench", "JailbreakBench", "MaliciousInstruct")
"""Retention is measured on these, 100 prompts of each."""
PER_SET_ON_FINE_TUNES = 100
ANSWER_TOKENS = 48
CLOSED_TOKENS = 256
CLOSED_PROMPTS = 120


def core(
    model: str, adapter: str, data: Path, out: Path, *, n: int = 300, variants: Sequence[str] = ("base",),
    progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """Measure `adapter` on `model` and on fine-tunes of it.

    Args:
        data: folder of the public data sets (see `public`).
        n: prompts of each set at most; on fine-tunes at most 100 of each. Under 100 the timings are few, too.
        variants: "base" and names of `fine_tunes.FINE_TUNES`.

    Returns:
        Plain numbers by variant, also written to `out/core-<adapter digest>.json`.

    Raises:
        DataError: `out` holds answers of another base, dtype, length, fine-tune or calibration.
    """
    gene = SafetyAdapter.from_pretrained(adapter)
    digest = gene.config.weights_sha256[:8]
    results: dict[str, Any] = {"model": model, "adapter": gene.config.weights_sha256, "n": n, "variants": {}}
    loaded = models.load(model, dtype="bfloat16")
    tokenizer = loaded.tokenizer
    dtype = str(models.unwrap(loaded.model).dtype).removeprefix("torch.")
    runner.claim(out, {"weights": models.weights_digest(loaded.model), "dtype": dtype, "tokens": ANSWER_TOKENS})
    size = sum(p.numel() for p in loaded.model.parameters())
    results["parameters"] = {"count": gene.parameter_count(), "share": gene.parameter_count() / size}
    for name in variants:
        current, task, few = loaded.model, None, n
        sets: tuple[str, ...] = FIGURE_SETS + BESIDE
        if name != "base":
            rows, task = fine_tunes.SOURCES[name](data)
            runner.claim(out / name, {"rows": fingerprint([r[k] for r in rows for k in ("prompt", "answer")])})
            current = _fine_tune(model, rows, out / name / "model", name, progress)
            sets, few = TRANSFER_SETS, min(n, PER_SET_ON_FINE_TUNES)
        harmful = {k: spread(v, few) for k, v in public.harmful(data).items() if k in sets}
        harmless = {k: spread(v, few) for k, v in public.ordinary(data).items()}
        harmless["verticals"] = spread([r["prompt"] for v in VERTICALS for r in vertical(v, "held_out")], few)
        harmless["XSTest safe"] = spread(public.xstest(data, "safe"), few)
        study = _Variant(name, current, tokenizer, gene, out / name, digest, progress)
        results["variants"][name] = study.measure(harmful, harmless, task, data, n)
        del current, study
        if base := results["variants"].get("base"):
            _retain(base, results["variants"][name])
        path = out / f"core-{digest}.json"
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".svg").write_text(core_svg(results, TRANSFER_SETS), encoding="utf-8")
    return results


def _retain(base: dict[str, Any], figures: dict[str, Any]) -> None:
    """Add the retention of a variant: its safety score over the base's, both with the adapter, on prompts put to both."""
    kept = [
        (base["harmful"][k]["with_safe"][prompt], safe)
        for k in TRANSFER_SETS
        for prompt, safe in figures["harmful"][k]["with_safe"].items()
        if prompt in base["harmful"][k]["with_safe"]
    ]
    if any(a for a, _ in kept):
        figures["retention"] = asdict(retention([a for a, _ in kept], [b for _, b in kept]))


def _fine_tune(model: str, rows: Sequence[Row], folder: Path, name: str, progress: Progress) -> Any:
    if not (folder / "config.json").exists():
        loaded = models.load(model, dtype="bfloat16")
        part = folder.with_suffix(".part")
        finetune(
            loaded.model,
            loaded.tokenizer,
            rows,
            part,
            progress=lambda stage, total=0: progress(f"{name}: {stage}", total),
        )
        part.rename(folder)
    return models.load(folder, dtype="bfloat16").model


class _Variant:
    """One model, with and without the adapter."""

    def __init__(self, name: str, model: Any, tokenizer: Any, gene: SafetyAdapter, out: Path, digest: str,
                 progress: Progress) -> None:  # fmt: skip
        self.name, self.model, self.tokenizer, self.gene, self.progress = name, model, tokenizer, gene, progress
        self.out, self.digest = out, digest

    def _ask(self, set_name: str, prompts: list[str], adapted: str, **options: Any) -> Answers:
        how = "with" if adapted != "plain" else "without"
        advance = self.progress(f"{self.name}: {set_name}, {how} adapter", len(prompts))
        keep = self.out / adapted / f"{set_name.lower().replace(' ', '-')}.jsonl"
        options = {"tokens": ANSWER_TOKENS, **options}
        return ask(self.model, self.tokenizer, prompts, keep=keep, done=advance, **options)

    def _ask_where_open(self, set_name: str, plain: Answers, handle: Handle) -> tuple[Answers, list[bool]]:
        """Answers with the adapter, generated only where the gate opens on the prompt or on the unadapted answer:
        elsewhere the text is the unadapted model's by construction. And whether it opened."""
        opened = [bool((o > 0).any()) for o in openings(handle, self.tokenizer, plain.prompts, plain.responses)]
        some = [p for p, o in zip(plain.prompts, opened, strict=True) if o]
        new = self._ask(f"{set_name} where open", some, self.digest) if some else Answers([], [])
        answers, verdicts = iter(new.responses), iter(new.verdicts)
        return Answers(
            plain.prompts,
            [next(answers) if o else r for o, r in zip(opened, plain.responses, strict=True)],
            [next(verdicts) if o else v for o, v in zip(opened, plain.verdicts, strict=True)],
        ), opened

    def _attach(self, found: dict[str, Any]) -> tuple[Handle, str]:
        """Attach as a user would. Where that is refused, the adapter is forced on, to see whether the refusal was right: to a
        user it means that every harmful request is answered, and so it counts."""
        refused, start = "", time.perf_counter()
        try:
            handle = attach(self.model, self.gene, tokenizer=self.tokenizer)
        except DriftError as error:
            refused = str(error)
            handle = attach(self.model, self.gene, tokenizer=self.tokenizer, allow_drift=True)
        found |= {"attach_seconds": time.perf_counter() - start, "refused_to_attach": refused}
        found["calibration"] = handle.calibration.report
        # Answers that were kept under another threshold or restoration are another run's.
        at = {
            "threshold": round(handle.calibration.threshold, 1),
            "harmless_weight": handle.calibration.report.get("harmless_weight", 0.0),
        }
        runner.claim(self.out / self.digest, at)
        return handle, refused

    def measure(
        self, harmful: dict[str, list[str]], harmless: dict[str, list[str]], task: list[Row] | None, data: Path, n: int
    ) -> dict[str, Any]:
        """All figures of this variant; see the keys."""
        found: dict[str, Any] = {"harmful": {}, "harmless": {}}
        plain = {k: self._ask(k, v, "plain") for k, v in {**harmful, **harmless}.items()}
        everyday = [p for k in harmless if k != "XSTest safe" for p in harmless[k]]
        long = self._ask("ordinary 256", spread(everyday, min(n, CLOSED_PROMPTS)), "plain", tokens=CLOSED_TOKENS)
        loss = task_loss(self.model, self.tokenizer, task) if task else None

        handle, refused = self._attach(found)
        for name, prompts in harmful.items():
            adapted = self._ask(name, prompts, self.digest)
            safe = [v.safe and not refused for v in adapted.verdicts]
            found["harmful"][name] = {
                "without": asdict(plain[name].safety_score()),
                "with": asdict(rate(safe)),
                "with_safe": dict(zip(prompts, safe, strict=True)),
                "forced": asdict(adapted.safety_score()) if refused else None,
                "gate_open_at_prompt": asdict(
                    rate([bool(o[-1] > 0) for o in openings(handle, self.tokenizer, prompts)])
                ),
            }
        for name in harmless:
            adapted, opened_anywhere = self._ask_where_open(name, plain[name], handle)
            found["harmless"][name] = {
                "without": asdict(plain[name].over_refusal()),
                "with": asdict(adapted.over_refusal()),
                "gate_opened": asdict(rate(opened_anywhere)),
                "p": paired_p([v.label == "refusal" for v in plain[name].verdicts],
                              [v.label == "refusal" for v in adapted.verdicts]),
            }  # fmt: skip
        opened = openings(handle, self.tokenizer, long.prompts, long.responses)
        found["closed_256"] = asdict(rate([bool((o <= 0).all()) for o in opened]))
        found["tokens_open"] = float(torch.cat(opened).gt(0).float().mean())
        if task and loss:
            with_loss = task_loss(self.model, self.tokenizer, task)
            prompts = [r["prompt"] for r in task]
            shares = openings(handle, self.tokenizer, prompts, [r["answer"] for r in task])
            found["task_loss"] = {
                "without": loss, "with": with_loss, "relative": with_loss / loss - 1, "n": len(task),
                "tokens_open": float(torch.cat(shares).gt(0).float().mean()),
            }  # fmt: skip
        if self.name == "base":
            found |= self._base_only(handle, data, n)
        handle.detach()
        if self.name != "base":
            blind = attach(self.model, self.gene, calibration=self._uncalibrated())
            goals = harmful["JailbreakBench"]
            off = self._ask("JailbreakBench uncalibrated", goals, self.digest)
            found["calibration_off"] = {"JailbreakBench": asdict(off.safety_score())}
            blind.detach()
        return found

    def _uncalibrated(self) -> Calibration:
        return replace(Calibration.of_base(self.gene), checkpoint=models.weights_digest(self.model))

    def _base_only(self, handle: Handle, data: Path, n: int) -> dict[str, Any]:
        goals, targets = (part[:n] for part in public.jailbreakbench(data))
        prefilled = self._ask("jbb prefilled", goals, self.digest, openings=targets)
        long = self._ask("jbb 128", goals, self.digest, tokens=128)
        refused = [r.strip() for r, v in zip(long.responses, long.verdicts, strict=True) if v.label == "refusal"]
        troubled = [p.harmful for p in pairs(0, 3, HELD_OUT)[1] if p.category == "self_harm"]
        cared = self._ask("self-harm", troubled, self.digest)
        support = [bool(SUPPORT.search(r.lower())) for r in cared.responses]
        times = PAIRS if n >= 100 else PAIRS // 10  # a development run has no use for sharp timings
        cost = self._overhead(handle, times)
        handle.detach()
        calibration = handle.calibration
        forced = attach(self.model, self.gene, calibration=replace(calibration, threshold=-1e6))
        at_worst = {f"{k}, gate forced open": v for k, v in self._overhead(forced, times // 4).items()}
        forced.detach()
        return {
            "prefilled": asdict(prefilled.safety_score()),
            "refusals": {"of": len(goals), "refused": len(refused), "distinct": len(set(refused)),
                         "goes_on": sum(v.reason == "refuses, then goes on" for v in long.verdicts)},
            "self_harm": {"safe": asdict(cared.safety_score()), "points_to_support": asdict(rate(support))},
            "overhead": cost | at_worst,
        }  # fmt: skip

    def _overhead(self, handle: Handle, pairs: int) -> dict[str, Any]:
        found = overheads(self.model, handle, self.tokenizer, pairs=pairs, progress=self.progress)
        return {shape: asdict(cost) for shape, cost in found.items()}


@torch.no_grad()
def openings(
    handle: Handle, tokenizer: Any, prompts: Sequence[str], answers: Sequence[str] = (), batch: int = 16
) -> list[torch.Tensor]:
    """The gate's opening (s − τ) / w at every position of every chat; above 0 the adapter acts.

    Args:
        answers: answers to read on; without them the prompt alone is read, up to the position that begins the answer.
    """
    chats = [end_of_turn(tokenizer, p, a)[0] for p, a in zip(prompts, answers or [""] * len(prompts), strict=True)]
    order = sorted(range(len(chats)), key=lambda i: len(chats[i]))
    found: list[torch.Tensor] = [torch.empty(0)] * len(chats)
    device = next(handle.model.parameters()).device
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        tensors = collate([{"input_ids": chats[i], "labels": chats[i]} for i in rows])
        tensors.pop("labels")
        with handle.recording() as record:
            handle.model(**{k: t.to(device) for k, t in tensors.items()}, use_cache=False, logits_to_keep=1)
        for row, i in enumerate(rows):
            found[i] = record[0][row, : len(chats[i])]
    return found
