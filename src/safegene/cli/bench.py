"""safegene bench"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from safegene.cli._run import progress_bars
from safegene.errors import SafegeneError
from safegene.outputs import prepare_file


def command(
    recipe: Annotated[
        Path,
        typer.Argument(help="A recipe such as recipes/bench-*.yaml; or the word overhead, to time an adapter only."),
    ],
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
    shape: Annotated[
        str,
        typer.Option(
            help="overhead: 8b or 70b, Llama 3's shape with random weights, in place of --model and --adapter."
        ),
    ] = "",
    mode: Annotated[
        str,
        typer.Option(
            help="overhead: eager, compile or graphs; also times batch 64 and the first token, and says the memory."
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, nothing else.")] = False,
) -> None:
    """Put the adapter and its rivals on the same fine-tunes and prompts."""
    if str(recipe) == "overhead":
        _check(shape, mode, dtype)
        _overhead(model, adapter, dtype, shape, mode, as_json)
        return
    if shape or mode:
        raise typer.BadParameter("--shape and --mode go with the word overhead.")
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


def _check(shape: str, mode: str, dtype: str) -> None:
    """Raises:
    BadParameter: what `overhead` was asked for is not to be had.
    """
    import torch

    from safegene.evaluation.shapes import SHAPES

    if shape and shape not in SHAPES:
        raise typer.BadParameter(f"--shape is {' or '.join(SHAPES)}, not '{shape}'.")
    if shape and dtype != "bfloat16":
        raise typer.BadParameter("--shape is timed in bfloat16.")
    if mode not in ("", "eager", "compile", "graphs"):
        raise typer.BadParameter(f"--mode is eager, compile or graphs, not '{mode}'.")
    if mode == "graphs" and not torch.cuda.is_available():
        raise typer.BadParameter("--mode graphs needs CUDA, and there is none; give eager or compile.")


def _overhead(model: str, adapter: str, dtype: str, shape: str, mode: Any, as_json: bool) -> None:
    """Time with the adapter against time without, on this machine; where a shape or a mode is given, memory too."""
    from safegene import models
    from safegene.adapter import SafetyAdapter
    from safegene.attach import attach
    from safegene.evaluation import shapes
    from safegene.evaluation.overhead import LARGEST, costs, overheads

    said: dict[str, Any] = {"model": model, "dtype": dtype}
    with progress_bars() as progress:
        if shape:
            said["model"] = f"{shape} shape, random weights"
            shapes.check_room(shape, *LARGEST[1:])
            progress(f"making {said['model']}")
            gene, tokenizer = shapes.random_adapter(shapes.SHAPES[shape]), None
            running = shapes.build(shapes.SHAPES[shape])
        else:
            gene = SafetyAdapter.from_pretrained(adapter)
            loaded = models.load(model, dtype=dtype)
            running, tokenizer = loaded.model, loaded.tokenizer
        if shape or mode:
            said |= {"device": running.device.type, "mode": mode or "eager"}
            said["memory"], found = costs(running, gene, tokenizer, said["mode"], progress=progress)
        else:
            found = overheads(running, attach(running, gene, tokenizer=tokenizer), tokenizer, progress=progress)
    if as_json:
        print(json.dumps({**said, **{k: asdict(o) for k, o in found.items()}}))
        return
    for size, o in found.items():
        times = f"; {1000 * o.seconds:.2f} ms with, {1000 * o.seconds_without:.2f} without" if "mode" in said else ""
        print(
            f"{size}: {100 * o.value:+.2f} % [{100 * o.low:+.2f}, {100 * o.high:+.2f}], {o.n} pairs, open at {100 * o.open:.2f} %{times}"
        )
    if memory := said.get("memory"):
        print(f"memory: {memory['with'] / 2**20:,.1f} MiB with, {memory['without'] / 2**20:,.1f} without")
