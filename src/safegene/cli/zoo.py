"""safegene zoo"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from safegene.cli._run import progress_bars


def command(
    action: Annotated[Literal["build"], typer.Argument(help="build: make what is missing and list all.")],
    recipe: Annotated[Path, typer.Argument(help="recipes/zoo-*.yaml")],
    data: Annotated[str, typer.Option(help="Folder of the public data sets, or the hub id of one that holds them.")],
    out: Annotated[Path, typer.Option(help="Where the fine-tunes are kept; run again to go on.")] = Path("runs/zoo"),
    only: Annotated[str, typer.Option(help="Comma-separated names: these, and what they are made from.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, nothing else.")] = False,
) -> None:
    """Build a declared set of fine-tunes of one base, each once."""
    from safegene.evaluation import public, zoo
    from safegene.evaluation.tables import zoo_markdown

    said = zoo.Recipe.from_yaml(recipe)
    names = [name.strip() for name in only.split(",") if name.strip()]
    with progress_bars() as progress:
        built = zoo.build(said, out, public.resolve(data), only=names, progress=progress)
    result = {"base": said.base, "fine_tunes": [{**b.record, "folder": str(b.folder)} for b in built]}
    if as_json:
        print(json.dumps(result))
    else:
        Console().print(zoo_markdown(result), markup=False, highlight=False, soft_wrap=True)
