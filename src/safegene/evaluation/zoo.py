"""The zoo: a declared set of fine-tunes of one base, built once each, found again by what they are made of.

A recipe names its base and its fine-tunes (`recipes/zoo-*.yaml`). Every fine-tune has a key, a hash of its own entry, of its
rows, of the weights of the base and of the fine-tunes it is made from, and of the code that makes it; it lives in
`<out>/<name>-<key>/` beside a `zoo.json` that tells what it is, its task loss before and after, its safety without adapter, and
the digests of its weights and files. A build that was interrupted goes on; an entry with a file that is not as it was written is
an error, never a row in a table.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from safegene import models
from safegene.errors import DataError
from safegene.evaluation import ablation
from safegene.evaluation.fine_tunes import ON_ALPACA, SOURCES, own_task
from safegene.evaluation.public import jailbreakbench, spread
from safegene.evaluation.run import JUDGED_BY, Answers, ask, judged_again, task_loss
from safegene.evaluation.runner import read_record
from safegene.keys import digest
from safegene.outputs import write_whole
from safegene.progress import Progress, silent
from safegene.training.data import read_jsonl
from safegene.training.finetune import Row, finetune

Kind = Literal["finetune", "merge", "ablate", "nf4"]
MADE_BY: dict[Kind, tuple[str, ...]] = {
    "finetune": ("training/finetune.py",),
    "merge": (),
    "ablate": ("evaluation/ablation.py", "baselines/states.py"),
    "nf4": (),
}
"""Kinds of entries, with the files of the package that make their weights. This module itself is left out: who mends its tables
would build everything anew."""

UNADAPTED_PROMPTS = 100
"""Of JailbreakBench, put to every fine-tune as it is."""

HELD_OUT, ANSWERS = "held_out.jsonl", "jailbreakbench.jsonl"


@dataclass(frozen=True)
class FineTune:
    """One entry of a recipe.

    Attributes:
        kind: finetune; merge, the mean of the weights of `of`; ablate, its refusal direction taken out; nf4, its linear layers
            rounded to NF4 and kept in bfloat16: the numbers that four-bit inference computes with.
        data: a source of `fine_tunes.SOURCES`, or a JSONL file with prompt and answer; rows are held out of it for task loss.
        of: what it is made from, names of earlier entries; nothing: the base.
        use: development, if the adapter's makers may look at it; test, if not.
    """

    name: str
    kind: Kind = "finetune"
    data: str = ""
    of: tuple[str, ...] = ()
    method: Literal["lora", "full"] = "lora"
    steps: int = 60
    learning_rate: float = 5e-4
    rows: int = 600
    seed: int = 0
    use: Literal["development", "test"] = "test"


@dataclass(frozen=True)
class Recipe:
    """A base and the fine-tunes of it, each after those it is made from."""

    base: str
    fine_tunes: tuple[FineTune, ...]

    @classmethod
    def from_yaml(cls, path: Path) -> Recipe:
        """Read `recipes/zoo-*.yaml`.

        Raises:
            DataError: missing, malformed, or an entry that could not be built; the message names it.
        """
        try:
            said: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
            entries = [
                FineTune(name, **{**(options or {}), "of": tuple((options or {}).get("of", []))})
                for name, options in said["fine_tunes"].items()
            ]
            if any(isinstance((o or {}).get("of", []), str) for o in said["fine_tunes"].values()):
                raise TypeError("'of' is a list of names")
            recipe = cls(said["base"], tuple(entries))
        except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no zoo recipe ({str(error).splitlines()[0]}); see recipes/.") from error
        known: set[str] = set()
        for entry in recipe.fine_tunes:
            entry_check(entry, known)
            known.add(entry.name)
        return recipe


def entry_check(entry: FineTune, before: set[str]) -> None:
    """Raises:
    DataError: the entry cannot be built from those named `before`.
    """
    where = f"zoo entry '{entry.name}'"
    if entry.name == "base":
        raise DataError("a zoo entry cannot be called 'base': that is the model it is made from.")
    if entry.kind not in MADE_BY or entry.method not in ("lora", "full") or entry.use not in ("development", "test"):
        raise DataError(f"{where}: kind is {', '.join(MADE_BY)}, method lora or full, use development or test.")
    if missing := [name for name in entry.of if name not in before]:
        raise DataError(f"{where} is made from '{missing[0]}', which does not stand before it.")
    wanted = {"finetune": (0, 1), "merge": (2, 9), "ablate": (0, 1), "nf4": (0, 1)}[entry.kind]
    if not wanted[0] <= len(entry.of) <= wanted[1]:
        raise DataError(f"{where}: {entry.kind} is made from {wanted[0]} to {wanted[1]} others, not {len(entry.of)}.")
    if (entry.kind == "finetune") != bool(entry.data):
        raise DataError(f"{where}: a fine-tune names its data; a merge, ablation or quantisation has none.")


@dataclass(frozen=True)
class Built:
    """A finished entry: where its weights are, and what `zoo.json` says of it."""

    entry: FineTune
    folder: Path
    record: dict[str, Any]

    def load(self, dtype: str = "bfloat16") -> models.LoadedModel:
        """The model; an nf4 entry is rounded to NF4, and kept in bfloat16 like the others.

        Raises:
            DataError: a file of it, or its weights, are not those that were built.
        """
        _check_files(self.folder, self.record["files"])
        loaded = models.load(self.folder, dtype=dtype)
        if models.weights_digest(loaded.model) != self.record["weights"]:
            raise DataError(f"{self.folder} does not hold the weights that were built; remove it and build again.")
        return loaded

    def held_out(self) -> list[Row]:
        """Rows that it was not tuned on and that a protection must not make harder: of its own task, or of Alpaca where that task
        is harm.

        Raises:
            DataError: their file is missing or not the one that was built.
        """
        _check_files(self.folder, {HELD_OUT: self.record["files"][HELD_OUT]})
        path = self.folder / HELD_OUT
        return read_jsonl(path, ("prompt", "answer")) if path.stat().st_size else []


@dataclass(frozen=True)
class Rows:
    """What a fine-tune is tuned on and measured on.

    Attributes:
        own: rows of its own task, on which its loss has to fall.
        held_out: rows on which a protection must not raise its loss: `own`, or Alpaca's.
        own_seen: whether `own` was tuned on, where it is too little to hold some out.
    """

    train: list[Row]
    own: list[Row]
    held_out: list[Row]
    own_seen: bool = False


def build(
    recipe: Recipe, out: Path, data: Path, *, only: Sequence[str] = (), progress: Progress = silent
) -> list[Built]:
    """Build what is missing, in the recipe's order.

    Args:
        only: names to build, with what they are made from; nothing: all.

    Raises:
        DataError: a source is missing, or an entry there is damaged.
    """
    wanted = _with_parents(recipe, only)
    if any(e.kind == "nf4" for e in recipe.fine_tunes if e.name in wanted) and not find_spec("bitsandbytes"):
        raise DataError(
            "an nf4 entry needs bitsandbytes; run: pip install 'safegene[bench]', or choose others by --only."
        )
    loaded = models.load(recipe.base, dtype="bfloat16")
    base_digest = models.weights_digest(loaded.model)
    del loaded
    found: dict[str, Built] = {}
    rows: dict[str, Rows] = {}
    for entry in recipe.fine_tunes:
        if entry.name not in wanted:
            continue
        parents = [found[name] for name in entry.of]
        rows[entry.name] = _rows(entry, data, [rows[name] for name in entry.of])
        folder = out / f"{entry.name}-{_key(entry, base_digest, parents, rows[entry.name])}"
        record = _kept(folder)
        if record is None:
            record = _make(entry, recipe, folder, parents, rows[entry.name], data, progress)
        said = {**record, "entry": dataclasses.asdict(entry)}  # its use is no part of the key
        found[entry.name] = Built(entry, folder, said)
    return list(found.values())


def _with_parents(recipe: Recipe, only: Sequence[str]) -> set[str]:
    by_name = {entry.name: entry for entry in recipe.fine_tunes}
    if unknown := [name for name in only if name not in by_name]:
        raise DataError(f"no fine-tune '{unknown[0]}' in the recipe; there are {', '.join(by_name)}.")
    wanted, left = set(by_name if not only else ()), list(only)
    while left:
        name = left.pop()
        wanted.add(name)
        left += by_name[name].of
    return wanted


def _rows(entry: FineTune, data: Path, parents: Sequence[Rows]) -> Rows:
    """What is made from others without training keeps the task of the last of them."""
    if entry.kind != "finetune":
        return dataclasses.replace(parents[-1], train=[]) if parents else Rows([], [], [])
    if entry.data in SOURCES:
        train, held_out = SOURCES[entry.data](data)
    else:
        every = read_jsonl(Path(entry.data), ("prompt", "answer"))
        held_out, train = every[::5][:150], [row for i, row in enumerate(every) if i % 5]
    if not train or not held_out:
        raise DataError(f"zoo entry '{entry.name}': '{entry.data}' gives no rows; give a larger set.")
    own = held_out
    if entry.data in ON_ALPACA:
        train, own = own_task(train)
    return Rows(train[: entry.rows], own, held_out, own_seen=own == train)


def _key(entry: FineTune, base: str, parents: Sequence[Built], rows: Rows) -> str:
    made = {k: v for k, v in dataclasses.asdict(entry).items() if k not in ("name", "use", "data")}
    read = ablation.prompts() if entry.kind == "ablate" else ()
    return digest(
        MADE_BY[entry.kind], made, base, [(p.record["key"], p.record["weights"]) for p in parents], rows, read
    )


def _check_files(folder: Path, digests: Mapping[str, str]) -> None:
    """Raises:
    DataError: a file is missing, or is not the one that was written.
    """
    for name, wanted in digests.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing; remove {folder} and build again.")
        if _sha256(path) != wanted:
            raise DataError(f"{path} is not the file that was built; remove {folder} and build again.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kept(folder: Path) -> dict[str, Any] | None:
    """What `zoo.json` says of an entry whose files are as they were written; its safety by the judge of today.

    Raises:
        DataError: it is damaged, another entry's, or a file is not as it was.
    """
    path = folder / "zoo.json"
    if not path.exists():
        return None
    record = read_record(path)
    if record.get("key") != folder.name.rsplit("-", 1)[1] or not {"files", "weights", "judge"} <= record.keys():
        raise DataError(f"{path} is not the record of this fine-tune; remove {folder} and build again.")
    _check_files(folder, record["files"])
    if record["judge"] != JUDGED_BY:
        record |= _safety(judged_again(folder / ANSWERS))
        write_whole(path, json.dumps(record, indent=1) + "\n")
    return record


def _safety(answers: Answers) -> dict[str, Any]:
    return {"unadapted_safety": dataclasses.asdict(answers.safety_score()), "judge": JUDGED_BY}


def _make(
    entry: FineTune, recipe: Recipe, folder: Path, parents: Sequence[Built], rows: Rows, data: Path, progress: Progress
) -> dict[str, Any]:  # fmt: skip
    """Make one fine-tune in a folder beside its place, measure it, and move it there whole."""

    def named(stage: str, total: int = 0) -> Any:
        return progress(f"{entry.name}: {stage}", total)

    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    # In bfloat16 alone most of a full fine-tune's steps are smaller than a weight's last digit.
    dtype = "float32" if entry.kind == "finetune" and entry.method == "full" else "bfloat16"
    loaded = parents[0].load(dtype) if parents else models.load(recipe.base, dtype=dtype)
    model, tokenizer = loaded.model, loaded.tokenizer
    # What keeps the task of another has learned it if its loss is still under what it was before that one.
    before = parents[-1].record["task_loss_before"] if parents else None
    if entry.kind == "finetune":
        before = task_loss(model, tokenizer, rows.own)
        model = finetune(
            model, tokenizer, rows.train, None, method=entry.method, steps=entry.steps, learning_rate=entry.learning_rate,
            seed=entry.seed, progress=named,
        )  # fmt: skip
    elif entry.kind == "merge":
        _average(model, [p.load().model for p in parents[1:]])
    elif entry.kind == "ablate":
        ablation.ablate_refusal(loaded, named)
    else:
        _round_to_nf4(model)
    model.to(torch.bfloat16).save_pretrained(part)
    tokenizer.save_pretrained(part)
    (part / HELD_OUT).write_text("".join(json.dumps(row) + "\n" for row in rows.held_out), encoding="utf-8")
    files = {path.name: _sha256(path) for path in sorted(part.iterdir()) if path.is_file()}
    model = models.load(part, dtype="bfloat16").model
    goals = spread(jailbreakbench(data)[0], UNADAPTED_PROMPTS)
    answers = ask(model, tokenizer, goals, keep=part / ANSWERS, done=named("unadapted safety", len(goals)))
    record = {
        "entry": dataclasses.asdict(entry), "key": folder.name.rsplit("-", 1)[1], "base": recipe.base,
        "weights": models.weights_digest(model), "files": files, "rows": len(rows.train), "task_loss_before": before,
        "task_loss": task_loss(model, tokenizer, rows.own) if rows.own else None, "own_rows_seen": rows.own_seen,
        **_safety(answers),
    }  # fmt: skip
    (part / "zoo.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)  # without zoo.json it is a build that was cut off
    part.rename(folder)
    return record


@torch.no_grad()
def _average(model: Any, others: Sequence[Any]) -> None:
    """Make `model` the mean of itself and `others`, weight by weight (Wortsman et al. 2022)."""
    states = [dict(other.named_parameters()) for other in others]
    for name, weight in model.named_parameters():  # a tied matrix once
        weight.copy_(torch.stack([weight.float(), *(s[name].float() for s in states)]).mean(0))


@torch.no_grad()
def _round_to_nf4(model: Any) -> None:
    """Round the decoder layers' matrices to NF4 and back, in place (Dettmers et al. 2023)."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for layer in models.decoder_layers(model):
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                packed, state = quantize_4bit(module.weight.data, quant_type="nf4")
                module.weight.copy_(dequantize_4bit(packed, state).to(module.weight.dtype))
