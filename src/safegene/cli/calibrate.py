"""safegene calibrate"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from safegene.outputs import prepare_file


def command(
    model: Annotated[str, typer.Option(help="The fine-tune: folder or hub id.")],
    adapter: Annotated[str, typer.Option(help="Adapter of its base.")],
    out: Annotated[Path, typer.Option(help="Calibration file to write.")] = Path("calibration.safetensors"),
    dtype: Annotated[
        str,
        typer.Option(
            help="bfloat16, float16, float32, or auto: the checkpoint's. The file is bound to the weights as they are loaded: "
            "give the dtype in which the model will be served, or it is refused there."
        ),
    ] = "auto",
    allow_drift: Annotated[bool, typer.Option(help="Write it even when the gate has lost its way here.")] = False,
) -> None:
    """Measure how far a fine-tune drifted and write the calibration that servers load. Prints the report as JSON."""
    from safegene import models
    from safegene.adapter import SafetyAdapter
    from safegene.attach import attach

    prepare_file(out)
    gene = SafetyAdapter.from_pretrained(adapter)
    loaded = models.load(model, dtype=dtype)
    handle = attach(loaded.model, gene, tokenizer=loaded.tokenizer, allow_drift=allow_drift)
    handle.calibration.save(out)
    print(json.dumps(handle.status()))
