"""safegene demo"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from safegene.cli._run import progress_bars
from safegene.models import EMBEDDED
from safegene.outputs import prepare_file

if TYPE_CHECKING:
    from safegene.evaluation.demo import DemoResult


def command(
    model: Annotated[str, typer.Option(help="Base model: folder, embedded name or hub id.")] = EMBEDDED,
    adapter: Annotated[str, typer.Option(help="Adapter of that base.")] = "smollm2-135m-instruct",
    n: Annotated[int, typer.Option(min=8, max=110, help="Harmful and harmless prompts each.")] = 100,
    out: Annotated[Path, typer.Option(help="Where the HTML report goes.")] = Path("safegene-demo.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, nothing else.")] = False,
) -> None:
    """Fine-tune a model on the spot, watch its safety go, attach the adapter, watch it come back."""
    from safegene.evaluation.demo import demo
    from safegene.evaluation.report import write

    prepare_file(out)
    with progress_bars() as progress:
        result = demo(model, adapter, n=n, progress=progress)
    # Before the page, so that the figures are not lost with it.
    if as_json:
        print(json.dumps(result.to_dict()), flush=True)
    else:
        _show(result)
    write(result, out)
    if not as_json:
        Console().print(f"\nreport: {out} ({result.seconds:.0f} s in all)")


def _show(result: DemoResult) -> None:
    table = Table(title=f"{result.model}: fine-tuned on the spot")
    for name in ("variant", "safety score", "over-refusal", "task loss"):
        table.add_column(name)
    for row in result.rows:
        table.add_row(row.variant, str(row.safety_score), str(row.over_refusal), f"{row.task_loss:.4f}")
    console = Console()
    console.print(table)
    retention = "not defined" if result.retention is None else f"{100 * result.retention:.1f} %"
    recovery = "not printed (lost under 10 points)" if result.recovery is None else f"{100 * result.recovery:.1f} %"
    console.print(f"retention {retention}; recovery {recovery}")
    cost = ", ".join(
        f"{k} {100 * o.value:+.1f} % [{100 * o.low:+.1f}, {100 * o.high:+.1f}]" for k, o in result.overhead.items()
    )
    console.print(
        f"adapter: {100 * result.parameter_share:.3f} % of the parameters, attached in {result.attach_seconds:.1f} s"
    )
    console.print(f"overhead, batch 1: {cost}")
    for example in result.examples[:3]:
        console.print(f"\n[bold]{escape(example['prompt'])}[/bold]")
        console.print(f"fine-tune           {example['fine-tune'][:70]!r}… (full answer in the report)", markup=False)
        console.print(f"fine-tune + adapter {example['fine-tune+adapter']!r}", markup=False)
