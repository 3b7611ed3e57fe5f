"""safegene report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def command(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders that safegene eval wrote; the first is compared with the others.")
    ],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
) -> None:
    """Put runs of safegene eval on one self-contained HTML page."""
    from safegene.evaluation.eval_report import write

    write(runs, out)
    Console().print(f"report: {out}")
