"""The zoo: a declared set of fine-tunes of one base, built once each, found again by what they are made of.

A recipe names its base and its fine-tunes (`recipes/zoo-*.yaml`). Every fine-tune has a key, a hash of its own entry, of its
rows, of the base, of the fine-tunes it is made from and of the code that makes it; it lives in `<out>/<name>-<key>/` beside a
`zoo.json` that tells what it is, its task loss before and after, its safety without adapter, and the digest of its weights. A
build that was interrupted goes on; an entry whose weights are not those that were written is an error, never a row in a table.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from safegene import models
from safegene.errors import DataError
from safegene.evaluation.ablation import ablate_refusal
from safegene.evaluation.fine_tunes import SOURCES
from safegene.evaluation.public import jailbreakbench, spread
from safegene.evaluation.run import ask, task_loss
from safegene.evaluation.runner import read_record
from safegene.progress import Progress, silent
from safegene.training.data import read_jsonl
from safegene.training.finetune import Row, finetune

Kind = Literal["finetune", "merge", "ablate", "nf4"]
PACKAGE = Path(__file__).parent.parent
MADE_BY: dict[Kind, tuple[str, ...]] = {
    "finetune": ("training/finetune.py",),
    "merge": (),
    "ablate": (
        "evaluation/ablation.py", "baselines/states.py", "training/data.py", "training/text/pairs", "training/text/ordinary.jsonl",
    ),
    "nf4": (),
}  # fmt: skip
"""Kinds of entries, with the files and folders of the package that their weights come from. This module itself is left out: who
rewords it would build everything anew."""

UNADAPTED_PROMPTS = 100
"""Of JailbreakBench, put to every fine-tune as it is."""


@dataclass(frozen=True)
class FineTune:
    """One entry of a recipe.

    Attributes:
        kind: finetune; merge, the mean of the weights of `of`; ablate, its refusal direction taken out; nf4, its linear layers
            rounded to four bits and back: the numbers that four-bit inference computes with.
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

    def load(self) -> models.LoadedModel:
        """The model, in bfloat16; an nf4 entry in four bits.

        Raises:
            DataError: its weights are not those that were built.
        """
        loaded = models.load(self.folder, dtype="bfloat16")
        if models.weights_digest(loaded.model) != self.record["weights"]:
            raise DataError(f"{self.folder} does not hold the weights that were built; remove it and build again.")
        return loaded

    def held_out(self) -> list[Row]:
        """Rows of its own task that it was not tuned on.

        Raises:
            DataError: their file is missing or damaged.
        """
        path = self.folder / "held_out.jsonl"
        return read_jsonl(path, ("prompt", "answer")) if path.stat().st_size else []


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
    for entry in recipe.fine_tunes:
        if entry.name not in wanted:
            continue
        parents = [found[name] for name in entry.of]
        train, held_out = _rows(entry, data, parents)
        key = _key(entry, base_digest, parents, train)
        folder = out / f"{entry.name}-{key}"
        record = _kept(folder)
        if record is None:
            record = _make(entry, recipe, folder, parents, train, held_out, data, progress)
        found[entry.name] = Built(entry, folder, record)
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


def _rows(entry: FineTune, data: Path, parents: Sequence[Built]) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows; what is made from others keeps the task of the last of them."""
    if entry.kind != "finetune":
        return [], [row for parent in parents[-1:] for row in parent.held_out()]
    if entry.data in SOURCES:
        train, held_out = SOURCES[entry.data](data)
    else:
        every = read_jsonl(Path(entry.data), ("prompt", "answer"))
        held_out, train = every[::5][:150], [row for i, row in enumerate(every) if i % 5]
    if not train or not held_out:
        raise DataError(f"zoo entry '{entry.name}': '{entry.data}' gives no rows; give a larger set.")
    return train[: entry.rows], held_out


def _key(entry: FineTune, base: str, parents: Sequence[Built], rows: Sequence[Row]) -> str:
    made = {k: v for k, v in dataclasses.asdict(entry).items() if k not in ("name", "use", "data")}
    said = [made, base, [p.record["key"] for p in parents], rows]
    return digest(MADE_BY[entry.kind], json.dumps(said, ensure_ascii=False))


def digest(places: Iterable[str | Path], *said: object) -> str:
    """Short digest of files and folders of the package, with what else is said: what was made by other code, or from other text,
    gets another name and is never taken for this."""
    found = hashlib.sha256(repr(said).encode())
    for place in places:
        path = PACKAGE / place
        for file in [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file()):
            found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()[:12]


def _kept(folder: Path) -> dict[str, Any] | None:
    path = folder / "zoo.json"
    return read_record(path) if path.exists() else None


def _make(
    entry: FineTune, recipe: Recipe, folder: Path, parents: Sequence[Built], train: Sequence[Row], held_out: list[Row],
    data: Path, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Make one fine-tune in a folder beside its place, measure it, and move it there whole."""

    def named(stage: str, total: int = 0) -> Any:
        return progress(f"{entry.name}: {stage}", total)

    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    source = str(parents[0].folder) if parents else recipe.base
    # In bfloat16 alone most of a full fine-tune's steps are smaller than a weight's last digit.
    full = entry.kind == "finetune" and entry.method == "full"
    loaded = models.load(source, dtype="float32" if full else "bfloat16")
    model, tokenizer = loaded.model, loaded.tokenizer
    before = task_loss(model, tokenizer, held_out) if entry.kind == "finetune" else None
    if entry.kind == "finetune":
        model = finetune(
            model, tokenizer, train, None, method=entry.method, steps=entry.steps, learning_rate=entry.learning_rate,
            seed=entry.seed, progress=named,
        )  # fmt: skip
    elif entry.kind == "merge":
        _average(model, [p.load().model for p in parents[1:]])
    elif entry.kind == "ablate":
        ablate_refusal(loaded, named)
    else:
        _round_to_nf4(model)
    model.to(torch.bfloat16).save_pretrained(part)
    tokenizer.save_pretrained(part)
    model = models.load(part, dtype="bfloat16").model
    goals = spread(jailbreakbench(data)[0], UNADAPTED_PROMPTS)
    answers = ask(
        model, tokenizer, goals, keep=part / "jailbreakbench.jsonl", done=named("unadapted safety", len(goals))
    )
    record = {
        "entry": dataclasses.asdict(entry), "key": folder.name.rsplit("-", 1)[1], "base": recipe.base,
        "weights": models.weights_digest(model), "rows": len(train), "task_loss_before": before,
        "task_loss": task_loss(model, tokenizer, held_out) if held_out else None,
        "unadapted_safety": dataclasses.asdict(answers.safety_score()),
    }  # fmt: skip
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in held_out)
    (part / "held_out.jsonl").write_text("".join(lines), encoding="utf-8")
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
