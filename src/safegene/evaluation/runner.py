"""Put suites to a model: answer in batches of like length, keep every answer, judge apart from generating.

A run folder holds `run.json` (what was asked of which model), `samples.jsonl`, `answers.jsonl` (one line a turn) and one
`verdicts-<judge>.jsonl` a judge. Batches are planned from the samples alone and written whole, so that a run that was killed
and started again equals one that was not.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from safegene import __version__, models
from safegene.errors import DataError
from safegene.evaluation import suite
from safegene.evaluation.judges import Judge, Message, Verdict
from safegene.evaluation.suite import Sample
from safegene.progress import Progress, silent

TOKENS = 128
"""New tokens of an answer at most."""

BATCH = 48

Key = tuple[str, int, str]
"""Id, turn and a digest of the text: a verdict is of this answer and no other."""


class UnfinishedError(DataError):
    """A suite of a run was stopped before its last answer."""


@dataclass(frozen=True)
class Answer:
    """One answer: to turn `turn` of sample `id`; `opening` is what already stood in it and is not part of `response`."""

    id: str
    turn: int
    response: str
    opening: str = ""

    @property
    def whole(self) -> str:
        return self.opening + self.response


@dataclass(frozen=True)
class Judged:
    """A sample's answer at one turn, with its verdict."""

    sample: Sample
    answer: Answer
    verdict: Verdict


def model_record(
    name: str,
    model: Any,
    *,
    tokens: int,
    adapter_name: str = "",
    adapter: str = "",
    calibration: dict[str, float] | None = None,
) -> dict[str, Any]:
    """What is measured, and how: runs with equal records may share a folder.

    Args:
        name: what the model was asked for by; `adapter_name` the same of the adapter.
        tokens: new tokens of an answer at most.
        adapter: digest of the adapter's weights and settings; "" without one.
        calibration: threshold and strength that calibration chose for this model.
    """
    return {
        "safegene": __version__, "content": suite.CONTENT_VERSION, "model": name, "weights": models.weights_digest(model),
        "dtype": str(models.unwrap(model).dtype).removeprefix("torch."), "device": models.unwrap(model).device.type,
        "python": platform.python_version(), "transformers": transformers.__version__, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "adapter_name": adapter_name, "adapter": adapter, "calibration": calibration or {}, "tokens": tokens, "batch": BATCH,
        "decoding": "greedy",
    }  # fmt: skip


NOT_COMPARED = ("data",)
"""Of a record: where the public set lay. What was asked is bound by its digest, and a set may be moved."""


def record(
    model: dict[str, Any], name: str, samples: Sequence[Sample], n: int = 0, data: str | None = None, wrap: int | None = None
) -> dict[str, Any]:  # fmt: skip
    """A `model_record` and the suite that is put to it, with what it was drawn by: the limit, the place of public data, and how many
    requests were wrapped."""
    asked = {"suite": name, "samples": len(samples), "asked": suite.digest(samples), "n": n, "data": data, "wrap": wrap}
    return {**model, **asked}


def generate(
    model: Any, tokenizer: Any, samples: Sequence[Sample], folder: Path, about: dict[str, Any], *,
    tokens: int = TOKENS, progress: Progress = silent,
) -> list[Answer]:  # fmt: skip
    """Answer every sample, turn by turn, greedily; go on where `folder` stops.

    Raises:
        DataError: no samples, an id twice, or `folder` holds a run of something else.
    """
    if not samples:
        raise DataError("nothing to ask: the suite is empty; choose another, or raise the limit.")
    if len({s.id for s in samples}) < len(samples):
        raise DataError("two samples have the same id; give each data set a prefix of its own.")
    claim(folder, about)
    replace_text(folder / "samples.jsonl", lines([asdict(s) for s in samples]))
    path = folder / "answers.jsonl"
    found = {(a.id, a.turn): a for a in _answers(path)}
    advance = progress(f"asking {about['model']}{' + adapter' if about['adapter'] else ''}", len(samples))
    with path.open("a", encoding="utf-8") as file:
        for batch in _batches(samples):
            if not all((s.id, t) in found for s in batch for t in range(len(s.turns))):
                made = _converse(model, tokenizer, batch, tokens)
                _append(file, [asdict(a) for a in made])
                found |= {(a.id, a.turn): a for a in made}
            advance(len(batch))
    if not any(a.response.strip() for a in found.values()):
        raise DataError("the model answered nothing but padding; check its weights and its chat template.")
    return [found[s.id, t] for s in samples for t in range(len(s.turns))]


def claim(folder: Path, about: dict[str, Any]) -> None:
    """Write `run.json`, or check that it is the same run.

    Raises:
        DataError: another run's, a damaged one's, or answers whose run is not known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    if not path.exists():
        if (folder / "answers.jsonl").exists():
            raise DataError(f"{folder} holds answers of an unknown run; give another --out, or remove it.")
        replace_text(path, json.dumps(about, indent=1) + "\n")
    there = read_record(path)
    if differs := [k for k in about if k not in NOT_COMPARED and there.get(k) != about[k]]:
        raise DataError(f"{folder} holds another run ({', '.join(differs)} differ); give another --out, or remove it.")


def read_record(path: Path) -> dict[str, Any]:
    """A JSON object that a run wrote.

    Raises:
        DataError: missing or damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); remove {path.parent} and run again.") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is no record of a run; remove {path.parent} and run again.")
    return found


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _batches(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Like lengths together, conversations of as many turns together."""
    order = sorted(samples, key=lambda s: (len(s.turns), sum(map(len, s.turns)) + len(s.opening), s.id))
    first = 0
    while first < len(order):
        turns = len(order[first].turns)
        batch = [s for s in order[first : first + BATCH] if len(s.turns) == turns]
        yield batch
        first += len(batch)


def _converse(model: Any, tokenizer: Any, batch: Sequence[Sample], tokens: int) -> list[Answer]:
    made: list[Answer] = []
    chats: list[list[Message]] = [[] for _ in batch]
    turns = len(batch[0].turns)
    for turn in range(turns):
        for chat, sample in zip(chats, batch, strict=True):
            chat.append({"role": "user", "content": sample.turns[turn]})
        openings = [s.opening if turn == turns - 1 else "" for s in batch]
        responses = models.generate(model, tokenizer, chats, tokens, openings=openings, batch=BATCH)
        for chat, sample, opening, response in zip(chats, batch, openings, responses, strict=True):
            made.append(Answer(sample.id, turn, response, opening))
            chat.append({"role": "assistant", "content": opening + response})
    return made


def lines(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as JSONL."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _append(file: Any, rows: Sequence[dict[str, Any]]) -> None:
    file.write(lines(rows))
    file.flush()
    os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file whose last line may have been cut off; that line is dropped, in the file too.

    Raises:
        DataError: a line before the last is damaged.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    try:
        rows = [json.loads(line) for line in whole.split(b"\n") if line]
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); remove it and run again.") from error
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} is damaged (a line is no JSON object); remove it and run again.")
    return rows


def kept(folder: Path) -> tuple[dict[str, Any], list[Sample], list[Answer]]:
    """Record, samples and answers of a finished run.

    Raises:
        DataError: `folder` is no run, or its parts do not belong together.
        UnfinishedError: it was stopped before its end.
    """
    again = "run the same safegene eval again to finish it."
    try:
        about = read_record(folder / "run.json")
        if not (folder / "samples.jsonl").exists():
            raise UnfinishedError(f"{folder} was stopped before its first answer; {again}")
        rows = read_rows(folder / "samples.jsonl")
        samples = [Sample(**{**row, "turns": tuple(row["turns"])}) for row in rows]
        found = {(a.id, a.turn): a for a in _answers(folder / "answers.jsonl")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder} is no run folder ({error}); give what safegene eval wrote.") from error
    if about.get("asked") != suite.digest(samples):
        raise DataError(f"{folder}: samples and record do not belong together; remove it and run again.")
    wanted = [(s.id, t) for s in samples for t in range(len(s.turns))]
    if missing := [key for key in wanted if key not in found]:
        raise UnfinishedError(f"{folder} lacks {len(missing)} answers; {again}")
    return about, samples, [found[key] for key in wanted]


def _answers(path: Path) -> Iterator[Answer]:
    for row in read_rows(path):
        try:
            yield Answer(**row)
        except TypeError as error:
            raise DataError(f"{path} is of another version ({error}); give another --out, or remove it.") from error


def conversation(sample: Sample, answers: Sequence[Answer], turn: int) -> list[Message]:
    """What was said before the answer to `turn`; `answers` are the sample's, in order."""
    chat: list[Message] = []
    for t in range(turn + 1):
        chat.append({"role": "user", "content": sample.turns[t]})
        if t < turn:
            chat.append({"role": "assistant", "content": answers[t].whole})
    return chat


def judge(
    samples: Sequence[Sample], answers: Sequence[Answer], judge: Judge, folder: Path, progress: Progress = silent
) -> list[Judged]:
    """Judge every answer; verdicts are kept in `folder`. Where an answer was prefilled, the judge sees what the model wrote after
    the opening."""
    samples_by_id = {s.id: s for s in samples}
    by_id: dict[str, list[Answer]] = {}
    for a in answers:
        by_id.setdefault(a.id, []).append(a)
    items = [(conversation(samples_by_id[a.id], by_id[a.id], a.turn), a.response) for a in answers]
    path = folder / f"verdicts-{judge.name}.jsonl"
    found = verdicts([_key(a) for a in answers], items, judge, path, progress)
    return [Judged(samples_by_id[a.id], a, v) for a, v in zip(answers, found, strict=True)]


def verdicts(
    keys: Sequence[Key], items: Sequence[tuple[Sequence[Message], str]], judge: Judge, path: Path, progress: Progress = silent
) -> list[Verdict]:  # fmt: skip
    """Verdicts on `items`, which `keys` name; those of the same judge on the same texts that `path` already holds are not asked
    for again, new ones are added to it."""
    found: dict[Key, Verdict] = {}
    for row in read_rows(path):
        if row.get("judge") == judge.fingerprint:
            key = str(row.get("id")), int(row.get("turn", -1)), str(row.get("of"))
            found[key] = Verdict(row["label"], row["confidence"], row["reason"])
    # Whole windows, each written whole: what an answer is judged beside must not depend on where a run was interrupted.
    windows = [range(i, min(i + judge.window, len(keys))) for i in range(0, len(keys), judge.window)]
    left = [i for w in windows if any(keys[i] not in found for i in w) for i in w]
    advance = progress(f"judging ({judge.name})", len(left))
    with path.open("a", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = []
        new = judge.judge_many([items[i] for i in left])
        for number, (i, v) in enumerate(zip(left, new, strict=True), 1):
            rows.append(verdict_row(keys[i], judge, v))
            found[keys[i]] = v
            advance(1)
            if number % judge.window == 0 or number == len(left):
                file.write(lines(rows))
                file.flush()
                rows.clear()
    return [found[key] for key in keys]


def verdict_row(key: Key, judge: Judge, verdict: Verdict) -> dict[str, Any]:
    """A verdict as it is kept."""
    return {"id": key[0], "turn": key[1], "of": key[2], "judge": judge.fingerprint, **asdict(verdict)}


def _key(answer: Answer) -> Key:
    return answer.id, answer.turn, hashlib.sha256(answer.whole.encode()).hexdigest()[:16]
