"""Public benchmarks as suites: read from a local folder or file in their authors' own columns, or from the hub.

Nothing of them is kept in the project. Every reader names the columns it needs, so that a set of another shape is an error
and not an empty run.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safegene.errors import DataError
from safegene.evaluation import public
from safegene.evaluation.suite import Sample

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class PublicSet:
    """One benchmark: what it measures, the files it may come in (glob patterns below the folder), and its reader."""

    name: str
    about: str
    files: tuple[str, ...]
    read: Callable[[Rows], Iterable[Sample]]


PUBLIC: dict[str, PublicSet] = {}


def public_set(about: str, *files: str) -> Callable[[Callable[[Rows], Iterable[Sample]]], Any]:
    """Register a reader of rows under its function's name."""

    def register(read: Callable[[Rows], Iterable[Sample]]) -> Callable[[Rows], Iterable[Sample]]:
        read.__doc__ = f"Samples of {about}, from rows in its authors' columns; KeyError where one is missing."
        PUBLIC[read.__name__] = PublicSet(read.__name__, about, files, read)
        return read

    return register


def load(name: str, source: str) -> list[Sample]:
    """Samples of a public set.

    Args:
        source: its file, a folder that holds it, or a hub data set id.

    Raises:
        DataError: not to be had, of an unknown format, empty, or without the columns it should have.
    """
    known = PUBLIC[name]
    path = Path(source).expanduser()
    path = path if path.is_file() else public.resolve(source)
    # The first pattern that finds anything: a set's other files may be subsets of it, or its harmless half. Searched from the
    # folder above, so that the set's own folder may be given too.
    found_by = ([path] if path.is_file() else _below(path, pattern) for pattern in known.files)
    files = next(filter(None, found_by), [])
    if not files:
        raise DataError(f"{source} holds no {name} (looked for {', '.join(known.files)}); give its folder or file.")
    rows = [{**row, "_file": file.stem} for file in files for row in read_file(file)]
    try:
        found = list(known.read(rows))
    except (KeyError, AttributeError, TypeError, IndexError) as error:
        raise DataError(f"{files[0]} lacks what {name} has ({error}); give the set as published.") from error
    if empty := [s.id for s in found if not all(t.strip() for t in s.turns)]:
        raise DataError(f"{files[0]}: {len(empty)} requests are empty, first {empty[0]}; fetch the set again.")
    if not found:
        raise DataError(f"{files[0]} holds no rows of {name}; fetch the set again.")
    return found


def _below(folder: Path, pattern: str) -> list[Path]:
    folder = folder.resolve()
    return sorted(f for f in folder.parent.glob(f"{folder.name}/{pattern}")) or sorted(
        f for f in folder.parent.glob(pattern) if f.is_relative_to(folder)
    )


def read_file(path: Path) -> Rows:
    """Rows of a CSV, JSON, JSONL or Parquet file.

    Raises:
        DataError: unreadable, or of another format.
    """
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                return list(csv.DictReader(file))
        if path.suffix == ".parquet":
            import pyarrow.parquet as parquet

            table: Rows = parquet.read_table(path).to_pylist()
            return table
        text = path.read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line.strip()]
        # Some authors give lines of JSON the name of a JSON file.
        if path.suffix == ".jsonl" or (path.suffix == ".json" and len(lines) > 1 and _whole(lines[0])):
            return [_row(json.loads(line)) for line in lines]
        if path.suffix == ".json":
            return [_row(row) for row in json.loads(text)]
    except ImportError as error:
        raise DataError(f"{path} is Parquet; pip install pyarrow, or give the set as CSV or JSONL.") from error
    except (OSError, UnicodeDecodeError, ValueError, TypeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch the data set again.") from error
    raise DataError(f"{path}: {path.suffix or 'no suffix'} is no format read here; give CSV, JSON, JSONL or Parquet.")


def _whole(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _row(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"_value": value}


def _samples(
    prefix: str,
    rows: Rows,
    text: Callable[[dict[str, Any]], str],
    category: Callable[[dict[str, Any]], str],
    harmful: bool,
) -> Iterable[Sample]:
    for number, row in enumerate(rows):
        yield Sample(f"{prefix}-{number:04d}", category(row) or prefix, harmful, (text(row).strip(),), source=prefix)


@public_set("520 harmful requests (Zou et al. 2023)", "**/advbench/harmful_behaviors.csv", "harmful_behaviors.csv")
def advbench(rows: Rows) -> Iterable[Sample]:
    return _samples("advbench", rows, lambda r: r["goal"], lambda r: "", True)


@public_set("320 harmful behaviours (Mazeika et al. 2024)", "**/harmbench_behaviors_text_test.csv")
def harmbench(rows: Rows) -> Iterable[Sample]:
    def text(row: dict[str, Any]) -> str:
        return f"{row['ContextString']}\n\n{row['Behavior']}" if row["ContextString"] else str(row["Behavior"])

    return _samples("harmbench", rows, text, lambda r: r["SemanticCategory"], True)


@public_set("100 harmful behaviours (Chao et al. 2024)", "**/jailbreakbench.csv", "**/harmful-behaviors.csv")
def jailbreakbench(rows: Rows) -> Iterable[Sample]:
    return _samples("jailbreakbench", rows, lambda r: r["Goal"], lambda r: r["Category"], True)


@public_set("313 forbidden prompts (Souly et al. 2024)", "**/strongreject_dataset.csv")
def strongreject(rows: Rows) -> Iterable[Sample]:
    return _samples("strongreject", rows, lambda r: r["forbidden_prompt"], lambda r: r["category"], True)


@public_set("250 safe look-alikes and 200 unsafe prompts (Röttger et al. 2023)", "**/xstest_prompts.csv")
def xstest(rows: Rows) -> Iterable[Sample]:
    for row in rows:
        unsafe = {"safe": False, "unsafe": True}[row["label"].lower()]
        yield Sample(f"xstest-{row['id']}", row["type"], unsafe, (row["prompt"],), source="xstest")


@public_set(
    "939 prompts that should not be answered (Wang et al. 2023)",
    "**/do-not-answer*/**/*.jsonl",
    "**/do_not_answer*.csv",
)
def do_not_answer(rows: Rows) -> Iterable[Sample]:
    def text(row: dict[str, Any]) -> str:
        return str(row["prompt"] if "prompt" in row else row["question"])

    return _samples("do_not_answer", rows, text, lambda r: str(r.get("risk_area", r["_file"])), True)


@public_set("harmless prompts that look toxic, or toxic ones (Cui et al. 2024)", "**/or-bench*.csv", "**/or_bench*.csv")
def or_bench(rows: Rows) -> Iterable[Sample]:
    # Its toxic half has the same columns: only the file's name tells, so a file renamed by a hub mirror is refused.
    for number, row in enumerate(rows):
        toxic = {"or-bench-80k": False, "or-bench-hard-1k": False, "or-bench-toxic": True}[
            row["_file"].replace("_", "-")
        ]
        yield Sample(f"or_bench-{number:05d}", row["category"], toxic, (row["prompt"],), source="or_bench")


@public_set(
    "450 unsafe instructions over 45 topics (Xie et al. 2024)",
    "**/sorry_bench*.csv",
    "**/sorry-bench*/**/question.jsonl",
)
def sorry_bench(rows: Rows) -> Iterable[Sample]:
    def text(row: dict[str, Any]) -> str:
        return str(row["turns"][0] if isinstance(row["turns"], list) else row["turns"])

    return _samples("sorry_bench", rows, text, lambda r: str(r["category"]), True)


@public_set("multi-turn coreference attacks (Yu et al. 2024)", "**/CoSafe datasets/*.json")
def cosafe(rows: Rows) -> Iterable[Sample]:
    for number, row in enumerate(rows):
        turns = tuple(m["content"] for m in row["_value"] if m["role"] == "user")
        yield Sample(
            f"cosafe-{number:04d}", row["_file"], True, turns, form="coreference", harmful_from=len(turns) - 1, source="cosafe"
        )  # fmt: skip


@public_set("harmless security questions that look malicious (CyberSecEval, Bhatt et al. 2024)", "**/mitre_frr.json")
def cyberseceval_frr(rows: Rows) -> Iterable[Sample]:
    return _samples("cyberseceval_frr", rows, lambda r: r["mutated_prompt"], lambda r: str(r["attack_type"]), False)
