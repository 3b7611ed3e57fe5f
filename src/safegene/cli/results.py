"""safegene results"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from safegene.cli._run import progress_bars
from safegene.models import EMBEDDED


def command(
    data: Annotated[str, typer.Option(help="Folder of the public data sets, or the hub id of one that holds them.")],
    model: Annotated[str, typer.Option(help="Base model: folder, embedded name or hub id.")] = EMBEDDED,
    adapter: Annotated[str, typer.Option(help="Adapter of that base.")] = "smollm2-135m-instruct",
    out: Annotated[Path, typer.Option(help="Where texts and figures are kept; run again to go on.")] = Path("results"),
    n: Annotated[int, typer.Option(min=10, help="Prompts of each set at most.")] = 300,
    variants: Annotated[
        str, typer.Option(help="Comma-separated, of base, sure, gsm8k, medical, role-play, identity, compliant.")
    ] = "base,sure,gsm8k,medical",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, nothing else.")] = False,
) -> None:
    """Measure an adapter on its base and on fine-tunes of it, from public data sets."""
    from safegene.errors import DataError
    from safegene.evaluation import fine_tunes, public
    from safegene.evaluation.core import core
    from safegene.evaluation.tables import core_markdown

    names = variants.split(",")
    if unknown := [v for v in names if v != "base" and v not in fine_tunes.FINE_TUNES]:
        raise DataError(f"no variant '{unknown[0]}'; there are base, {', '.join(fine_tunes.FINE_TUNES)}.")
    with progress_bars() as progress:
        results = core(model, adapter, public.resolve(data), out, n=n, variants=names, progress=progress)
    if as_json:
        print(json.dumps(results))
    else:
        Console().print(core_markdown(results), markup=False, highlight=False, soft_wrap=True)
