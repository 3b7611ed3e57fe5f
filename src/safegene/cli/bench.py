"""safegene bench"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from safegene.cli._run import progress_bars
from safegene.errors import SafegeneError
from safegene.outputs import prepare_file


def command(
    recipe: Annotated[Path, typer.Argument(help="recipes/bench-*.yaml; or the word overhead: time alone.")],
    data: Annotated[
        str, typer.Option(help="Folder of the public data sets, or the hub id of one that holds them.")
    ] = "",
    out: Annotated[Path, typer.Option(help="Where answers and figures are kept; run again to go on.")] = Path(
        "runs/bench"
    ),
    report: Annotated[Path | None, typer.Option(help="Also write one HTML page.")] = None,
    model: Annotated[str, typer.Option(help="overhead: the model, folder or hub id.")] = "SmolLM2-135M-Instruct",
    adapter: Annotated[str, typer.Option(help="overhead: the adapter of its base.")] = "smollm2-135m-instruct",
    dtype: Annotated[str, typer.Option(help="overhead: bfloat16, float16 or float32.")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, nothing else.")] = False,
) -> None:
    """Put the adapter and its rivals on the same fine-tunes and prompts."""
    if str(recipe) == "overhead":
        _overhead(model, adapter, dtype, as_json)
        return
    if not data:
        raise typer.BadParameter("a recipe needs --data, the folder of the public data sets.")
    from safegene.evaluation import bench, bench_report, public
    from safegene.evaluation.tables import bench_markdown

    said = bench.Recipe.from_yaml(recipe)
    if report is not None:
        prepare_file(report)
    with progress_bars() as progress:
        result = bench.bench(said, out, public.resolve(data), progress=progress)
    if as_json:
        print(json.dumps(result), flush=True)
    else:
        Console().print(bench_markdown(result), markup=False, highlight=False, soft_wrap=True)
    if report is not None:
        bench_report.write(result, report)
    if failed := result["failed"]:
        raise SafegeneError(
            f"{len(failed)} of {len(failed) + len(result['cells'])} cells could not be measured, first {failed[0]['method']} on "
            f"{failed[0]['fine_tune']} ({failed[0]['error']}); run the same command again to try them."
        )


def _overhead(model: str, adapter: str, dtype: str, as_json: bool) -> None:
    """Time with the adapter against time without, on this machine."""
    from safegene import models
    from safegene.adapter import SafetyAdapter
    from safegene.attach import attach
    from safegene.evaluation.overhead import overheads

    gene = SafetyAdapter.from_pretrained(adapter)
    loaded = models.load(model, dtype=dtype)
    handle = attach(loaded.model, gene, tokenizer=loaded.tokenizer)
    with progress_bars() as progress:
        found = overheads(loaded.model, handle, loaded.tokenizer, progress=progress)
    if as_json:
        print(json.dumps({"model": model, "dtype": dtype, **{k: asdict(o) for k, o in found.items()}}))
        return
    for shape, o in found.items():
        print(
            f"{shape}: {100 * o.value:+.2f} % [{100 * o.low:+.2f}, {100 * o.high:+.2f}], {o.n} pairs, open at {100 * o.open:.2f} %"
        )
