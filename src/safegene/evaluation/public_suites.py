"""Public benchmarks as suites: read from a local folder or file in their authors' own columns, or from the hub.

Nothing of them is kept in the project. Every reader names the columns it needs, and one that tells its set from others, so that
a set of another shape is an error and not an empty or a wrong run.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safegene.errors import DataError
from safegene.evaluation import public
from safegene.evaluation.suite import Sample

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class PublicSet:
    """One benchmark: what it measures, the files it may come in, its reader, and a hub data set that holds it, if there is one.

    `files` are glob patterns below the folder; the first that finds anything counts, patterns joined by | count together.
    """

    name: str
    about: str
    files: tuple[str, ...]
    read: Callable[[Rows], Iterable[Sample]]
    hub: str = ""


PUBLIC: dict[str, PublicSet] = {}


def public_set(about: str, *files: str, hub: str = "") -> Callable[[Callable[[Rows], Iterable[Sample]]], Any]:
    """Register a reader of rows under its function's name."""

    def register(read: Callable[[Rows], Iterable[Sample]]) -> Callable[[Rows], Iterable[Sample]]:
        read.__doc__ = f"Samples of {about}, from rows in its authors' columns; KeyError where one is missing."
        PUBLIC[read.__name__] = PublicSet(read.__name__, about, files, read, hub)
        return read

    return register


def places(items: Sequence[str]) -> dict[str, str]:
    """Where each public set is, from items SUITE=PLACE; an item without a suite, under "", serves all the others.

    Raises:
        DataError: no such suite, or two places for one.
    """
    found: dict[str, str] = {}
    for item in items:
        name, equals, place = item.partition("=")
        if name not in PUBLIC:
            if equals and not Path(item).expanduser().exists():
                raise DataError(f"--data {item}: no public set '{name}'; there are {', '.join(PUBLIC)}.")
            name, place = "", item
        if name in found:
            raise DataError(f"--data names two places for {name or 'all sets'}; give them as SUITE=PLACE, one each.")
        found[name] = place
    return found


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
    # The first pattern that finds anything: a set's other files may be subsets of it, or its harmless half.
    found_by = ([path] if path.is_file() else _below(path, pattern) for pattern in known.files)
    files = next(filter(None, found_by), [])
    if not files:
        raise DataError(f"{source} holds no {name} (looked for {', '.join(known.files)}); give its folder or file.")
    rows = [{**row, "_file": file.stem} for file in files for row in read_file(file)]
    try:
        found = list(known.read(rows))
    except (KeyError, AttributeError, TypeError, IndexError, ValueError) as error:
        raise DataError(f"{files[0]} lacks what {name} has ({error}); give the set as published.") from error
    if empty := [s.id for s in found if not all(t.strip() for t in s.turns)]:
        raise DataError(f"{files[0]}: {len(empty)} requests are empty, first {empty[0]}; fetch the set again.")
    if not found:
        raise DataError(f"{files[0]} holds no rows of {name}; fetch the set again.")
    return found


def _below(folder: Path, patterns: str) -> list[Path]:
    """Files of any of the patterns in `folder`, which may also be the folder that a pattern names first."""
    folder, found = folder.resolve(), set[Path]()
    for pattern in patterns.split("|"):
        named, _, rest = pattern.removeprefix("**/").partition("/")
        found |= set(folder.glob(pattern))
        found |= set(folder.glob(rest)) if rest and fnmatch(folder.name, named) else set()
    return sorted(found)


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


def _column(row: dict[str, Any], *names: str, beside: str = "") -> str:
    """The first of the columns `names` that the row has; `beside` is one by which the set is known, and must be there too."""
    name = next((n for n in names if n in row), "")
    if not name or (beside and beside not in row):
        raise KeyError(" or ".join(names) + (f" beside {beside}" if beside else ""))
    return str(row[name] or "")


def _samples(
    prefix: str,
    rows: Rows,
    text: Callable[[dict[str, Any]], str],
    category: Callable[[dict[str, Any]], str],
    harmful: bool,
) -> Iterable[Sample]:
    for number, row in enumerate(rows):
        yield Sample(f"{prefix}-{number:04d}", category(row) or prefix, harmful, (text(row).strip(),), source=prefix)


@public_set(
    "520 harmful requests (Zou et al. 2023)",
    "**/advbench/harmful_behaviors.csv",
    "harmful_behaviors.csv",
    "data/train-*.parquet",
    hub="walledai/AdvBench",
)
def advbench(rows: Rows) -> Iterable[Sample]:
    return _samples("advbench", rows, lambda r: _column(r, "goal", "prompt", beside="target"), lambda r: "", True)


@public_set(
    "320 harmful behaviours, 400 from the hub (Mazeika et al. 2024)",
    "**/harmbench_behaviors_text_test.csv",
    "standard/train-*.parquet|contextual/train-*.parquet|copyright/train-*.parquet",
    hub="walledai/HarmBench",
)
def harmbench(rows: Rows) -> Iterable[Sample]:
    def text(row: dict[str, Any]) -> str:
        context = row["ContextString"] if "Behavior" in row else row.get("context")
        behaviour = _column(row, "Behavior", "prompt")
        return f"{context}\n\n{behaviour}" if context else behaviour

    def category(row: dict[str, Any]) -> str:
        if "tags" in row and "category" not in row:  # the hub's copyright part
            return "copyright"
        return _column(row, "SemanticCategory", "category")

    return _samples("harmbench", rows, text, category, True)


@public_set(
    "100 harmful behaviours (Chao et al. 2024)",
    "**/jailbreakbench.csv",
    "**/harmful-behaviors.csv",
    hub="JailbreakBench/JBB-Behaviors",
)
def jailbreakbench(rows: Rows) -> Iterable[Sample]:
    return _samples("jailbreakbench", rows, lambda r: r["Goal"], lambda r: r["Category"], True)


@public_set(
    "313 forbidden prompts (Souly et al. 2024)",
    "**/strongreject_dataset.csv",
    "data/train-*.parquet",
    hub="walledai/StrongREJECT",
)
def strongreject(rows: Rows) -> Iterable[Sample]:
    def text(row: dict[str, Any]) -> str:
        return _column(row, "forbidden_prompt", "prompt", beside="source")

    return _samples("strongreject", rows, text, lambda r: r["category"], True)


@public_set(
    "250 safe look-alikes and 200 unsafe prompts (Röttger et al. 2023)",
    "**/xstest_prompts.csv",
    "data/test-*.parquet",
    hub="walledai/XSTest",
)
def xstest(rows: Rows) -> Iterable[Sample]:
    for number, row in enumerate(rows, 1):
        unsafe = {"safe": False, "unsafe": True}[str(row["label"]).lower()]
        yield Sample(f"xstest-{row.get('id', number)}", row["type"], unsafe, (row["prompt"],), source="xstest")


@public_set(
    "939 prompts that should not be answered (Wang et al. 2023)",
    "**/do-not-answer*/**/*.jsonl",
    "**/do_not_answer*.csv",
    "data/train-*.parquet",
    hub="LibrAI/do-not-answer",
)
def do_not_answer(rows: Rows) -> Iterable[Sample]:
    def text(row: dict[str, Any]) -> str:
        if "question" in row:
            return _column(row, "question", beside="risk_area")
        return _column(row, "prompt", beside="intents")

    return _samples("do_not_answer", rows, text, lambda r: str(r.get("risk_area", r["_file"])), True)


def _or_bench(name: str, rows: Rows, part: str, toxic: bool) -> Iterable[Sample]:
    # Its three files have the same columns: only the file's name tells, so a file under another name is refused.
    if others := {row["_file"] for row in rows} - {part, part.replace("-", "_")}:
        raise DataError(f"{name} is read from {part}.csv, not from {', '.join(sorted(others))}.csv; give that file.")
    return _samples(name, rows, lambda r: r["prompt"], lambda r: r["category"], toxic)


@public_set(
    "1,319 harmless prompts that look toxic, the hard ones of OR-Bench (Cui et al. 2024)",
    "**/or-bench-hard-1k.csv",
    "**/or_bench_hard_1k.csv",
    hub="bench-llm/or-bench",
)
def or_bench(rows: Rows) -> Iterable[Sample]:
    return _or_bench("or_bench", rows, "or-bench-hard-1k", False)


@public_set(
    "all 80,000 harmless prompts of OR-Bench that look toxic; take some with --n",
    "**/or-bench-80k.csv",
    "**/or_bench_80k.csv",
    hub="bench-llm/or-bench",
)
def or_bench_80k(rows: Rows) -> Iterable[Sample]:
    return _or_bench("or_bench_80k", rows, "or-bench-80k", False)


@public_set(
    "655 toxic prompts, OR-Bench's other side",
    "**/or-bench-toxic.csv",
    "**/or_bench_toxic.csv",
    hub="bench-llm/or-bench",
)
def or_bench_toxic(rows: Rows) -> Iterable[Sample]:
    return _or_bench("or_bench_toxic", rows, "or-bench-toxic", True)


@public_set(
    "450 unsafe instructions over 45 topics, 440 over 44 in the edition of 2025 (Xie et al. 2024)",
    "**/sorry_bench*.csv",
    "**/sorry-bench*/**/question.jsonl",
    "question.jsonl",
    hub="sorry-bench/sorry-bench-202503",
)
def sorry_bench(rows: Rows) -> Iterable[Sample]:
    def text(row: dict[str, Any]) -> str:
        turns = row["turns"] if isinstance(row["turns"], list) else [row["turns"]]
        (turn,) = turns  # MT-Bench's questions have the same columns and two turns
        return str(turn)

    base = [row for row in rows if row.get("prompt_style", "base") == "base"]
    return _samples("sorry_bench", base, text, lambda r: str(r["category"]), True)


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
