"""safegene finetune"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safegene.cli._run import progress_bars
from safegene.errors import DataError
from safegene.models import EMBEDDED
from safegene.outputs import prepare_folder


def command(
    data: Annotated[Path, typer.Option(help="JSONL with 'prompt' and 'answer'.")],
    out: Annotated[Path, typer.Option(help="Folder for the fine-tuned model.")],
    model: Annotated[str, typer.Option(help="Base model.")] = EMBEDDED,
    method: Annotated[str, typer.Option(help="lora or full.")] = "lora",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of 8 rows.")] = 50,
) -> None:
    """Make a fine-tune, as a user would; the LoRA is merged, so the result is an ordinary model folder."""
    from safegene import models
    from safegene.training.data import read_jsonl
    from safegene.training.finetune import finetune

    if method not in ("lora", "full"):
        raise DataError(f"method is '{method}'; use lora or full.")
    rows = read_jsonl(data, ("prompt", "answer"))
    prepare_folder(out)
    loaded = models.load(model)
    with progress_bars() as progress:
        finetune(loaded.model, loaded.tokenizer, rows, out, method=method, steps=steps, progress=progress)
    print(out)
