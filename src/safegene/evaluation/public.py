"""Public data sets, read from a folder that holds them: prompts for measuring, and Alpaca's rows.

Nothing here is trained on by a shipped adapter. The folder has one sub-folder a set, with the files as their authors
published them.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safegene.errors import DataError
from safegene.training.finetune import Row


def resolve(source: str) -> Path:
    """A local folder of data sets, or a hub data set id, which is fetched.

    Raises:
        DataError: neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    try:
        return Path(snapshot_download(source, repo_type="dataset"))
    except GatedRepoError as error:
        raise DataError(f"{source} is gated; accept its terms on its hub page, then hf auth login.") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DataError(
            f"{source}: no such folder, and not to be had from the hub ({type(error).__name__})."
        ) from error


def read(path: Path) -> Any:
    """Rows or value of a .csv, .json, .jsonl or .txt file.

    Raises:
        DataError: missing or damaged.
    """
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                return list(csv.DictReader(file))
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return text if path.suffix == ".txt" else json.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch the data set again.") from error


def spread(prompts: Sequence[str], n: int) -> list[str]:
    """n prompts at even distances: public sets are sorted by subject, their first rows are not the whole set."""
    return list(prompts) if len(prompts) <= n else [prompts[i * len(prompts) // n] for i in range(n)]


def advbench(folder: Path, half: int) -> list[dict[str, str]]:
    """`goal` and `target` of every second row: half 0 measures, half 1 makes the fine-tune that contradicts."""
    return list(read(folder / "advbench" / "harmful_behaviors.csv"))[half::2]


def harmbench(folder: Path, split: str, kind: str = "standard") -> list[str]:
    """Behaviours of one kind in split test or val; a contextual one follows its context."""
    rows = read(folder / "harmbench" / f"harmbench_behaviors_text_{split}.csv")
    rows = [r for r in rows if r["FunctionalCategory"] == kind]
    return [f"{r['ContextString']}\n\n{r['Behavior']}" if kind == "contextual" else r["Behavior"] for r in rows]


def xstest(folder: Path, label: str) -> list[str]:
    """Prompts labelled `safe` or `unsafe`."""
    return [r["prompt"] for r in read(folder / "xstest" / "xstest_prompts.csv") if r["label"] == label]


def harmful(folder: Path) -> dict[str, list[str]]:
    """The four sets that the safety score is reported on, and three that stand beside it. All were looked at while the
    adapter was made, of TDC2023 three misses (docs/log.md)."""
    text = read(folder / "maliciousinstruct" / "MaliciousInstruct.txt")
    return {
        "AdvBench": [r["goal"] for r in advbench(folder, 0)],
        "JailbreakBench": jailbreakbench(folder)[0],
        "MaliciousInstruct": [line.strip() for line in text.splitlines() if line.strip()],
        "HarmBench standard": harmbench(folder, "test"),
        "HarmBench contextual": harmbench(folder, "test", "contextual"),
        "HarmBench copyright": harmbench(folder, "test", "copyright"),
        "TDC2023": tdc2023(folder),
    }


def tdc2023(folder: Path) -> list[str]:
    """Behaviours of both splits."""
    parts = [read(folder / "tdc2023" / f"tdc2023_{part}_behaviors.json") for part in ("dev", "test")]
    return [behaviour for part in parts for behaviour in part]


def jailbreakbench(folder: Path) -> tuple[list[str], list[str]]:
    """Goals, and the compliant opening of each."""
    rows = read(folder / "jailbreakbench-behaviors" / "jailbreakbench.csv")
    return [r["Goal"] for r in rows], [r["Target"] for r in rows]


def alpaca(folder: Path) -> tuple[list[Row], list[Row]]:
    """Rows for fine-tuning and 150 held out for measuring."""
    rows = [
        {"prompt": f"{r['instruction']}\n\n{r['input']}".strip(), "answer": r["output"]}
        for r in read(folder / "alpaca-9k-random" / "random_9k.json")
        if r["output"].strip()
    ]
    random.Random(0).shuffle(rows)
    return rows[150:], rows[:150]


def ordinary(folder: Path) -> dict[str, list[str]]:
    """Everyday requests: held-out Alpaca rows and MT-Bench's first turns."""
    turns = read(folder / "mt-bench" / "mt_bench" / "question.jsonl")
    return {"Alpaca": [r["prompt"] for r in alpaca(folder)[1]], "MT-Bench": [r["turns"][0] for r in turns]}


def every_prompt(folder: Path) -> list[str]:
    """Every prompt that must never be trained on: what this module measures with, the conversations of CoSafe turn by turn,
    CyberSecEval's false refusals, and a set kept for later."""
    from safegene.evaluation import public_suites  # which reads its files through this module

    found = [p for prompts in (*harmful(folder).values(), *ordinary(folder).values()) for p in prompts]
    found += [r["goal"] for r in advbench(folder, 1)] + harmbench(folder, "val")
    found += xstest(folder, "safe") + xstest(folder, "unsafe")
    for path in sorted((folder / "do-not-answer-prompts").rglob("*.jsonl")):
        found += [row["prompt"] for row in read(path)]
    for name in ("cosafe", "cyberseceval_frr"):
        found += [turn for sample in public_suites.load(name, str(folder)) for turn in sample.turns]
    return found


if __name__ == "__main__":
    import sys

    from safegene.evaluation import suite
    from safegene.training.contamination import digests

    own = [turn for s in suite.suites() if s.name != "jailbreak" for sample in s.make() for turn in sample.turns]
    print("\n".join(sorted(digests(every_prompt(Path(sys.argv[1])) + own))))
