"""safegene train"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safegene.cli._run import progress_bars


def command(
    config: Annotated[Path, typer.Option(help="Recipe, such as recipes/smollm2-135m.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder for the adapter; run again to resume.")],
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(help="JSONL of evaluation prompts ('prompt'); training text must not contain them."),
    ] = None,
) -> None:
    """Train an adapter on a frozen base model."""
    from safegene.training import data
    from safegene.training.arguments import TrainingArguments
    from safegene.training.trainer import train

    arguments = TrainingArguments.from_yaml(config)
    prompts = [row["prompt"] for path in evaluation or [] for row in data.read_jsonl(path, ("prompt",))]
    with progress_bars() as progress:
        train(arguments, out, evaluation_prompts=prompts, progress=progress)
    print(out)
