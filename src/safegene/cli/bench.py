"""safegene bench"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from safegene.cli._run import progress_bars


def command(
    recipe: Annotated[Path, typer.Argument(help="recipes/bench-*.yaml")],
    data: Annotated[str, typer.Option(help="Folder of the public data sets, or the hub id of one that holds them.")],
    out: Annotated[Path, typer.Option(help="Where answers and figures are kept; run again to go on.")] = Path(
        "runs/bench"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, nothing else.")] = False,
) -> None:
    """Put the adapter and its rivals on the same fine-tunes and prompts."""
    from safegene.evaluation import bench, public
    from safegene.evaluation.tables import bench_markdown

    said = bench.Recipe.from_yaml(recipe)
    with progress_bars() as progress:
        result = bench.bench(said, out, public.resolve(data), progress=progress)
    if as_json:
        print(json.dumps(result))
    else:
        Console().print(bench_markdown(result), markup=False, highlight=False, soft_wrap=True)
