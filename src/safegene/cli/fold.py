"""safegene fold"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from safegene.cli._run import progress_bars
from safegene.errors import DataError
from safegene.outputs import prepare_folder


def command(
    model: Annotated[str, typer.Option(help="Fine-tune: folder or hub id.")],
    base: Annotated[str, typer.Option(help="The model it was tuned from.")],
    out: Annotated[Path, typer.Option(help="Folder for the folded model.")],
    kept: Annotated[
        Path,
        typer.Option(help="Where what is made once per base is kept; run again to go on, or for another fine-tune."),
    ] = Path("runs/fold"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, nothing else.")] = False,
) -> None:
    """Add the base's safety vector to a fine-tune's weights. Its first run on a base tunes two models there, a quarter of an hour for
    the embedded one by estimate; each fine-tune then takes 40 steps that train one number a layer."""
    from safegene import models
    from safegene.baselines.fold import fold

    if any(out.resolve() == Path(name).expanduser().resolve() for name in (model, base)):
        raise DataError(f"{out} is the folder of a model that is read; give another, that one is not written over.")
    prepare_folder(out)
    prepare_folder(kept)
    loaded = models.load(model)
    with progress_bars() as progress:
        report = fold(loaded.model, loaded.tokenizer, base, kept, progress=progress)
    loaded.model.save_pretrained(out)
    loaded.tokenizer.save_pretrained(out)
    layers = {name.removeprefix("layer_"): c for name, c in report.items() if name.startswith("layer_")}
    refuses = {name: report[f"{name}_refuses"] for name in ("aligned", "degraded")}
    if as_json:
        print(json.dumps({"model": model, "base": base, "out": str(out), "refuses": refuses, "layers": layers}))
        return
    said = ", ".join(f"the {name} model refuses {100 * share:.0f} %" for name, share in refuses.items())
    print(f"pair of the base: {said}\nlayers: {', '.join(f'{layer} × {c:.2f}' for layer, c in layers.items())}\n{out}")
