"""safegene judge"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from safegene.cli._run import progress_bars, stderr


def command(
    run: Annotated[
        Path | None,
        typer.Argument(
            help="The --out of safegene eval; or a JSONL file of answers from any tool, a line with prompt (or turns, or messages) and "
            "response (or answer), and if known harmful (true or false) and category."
        ),
    ] = None,
    judge: Annotated[
        str,
        typer.Option(
            help="default, rules, keywords; llama-guard, shieldgemma, harmbench, wildguard (from the hub, or NAME=FOLDER); or an "
            "OpenAI-compatible endpoint, as https://host/v1#model."
        ),
    ] = "default",
    agreement: Annotated[
        Path | None, typer.Option(help="Measure the judge against people: folder of labelled sets.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="With --agreement: where its verdicts are kept; run again to go on.")
    ] = Path("agreement"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, nothing else.")] = False,
) -> None:
    """Judge kept answers without generating, a run's or any tool's, or measure a judge's agreement with people."""
    from safegene.evaluation import agreement as people
    from safegene.evaluation import answers, judges, public
    from safegene.evaluation.evaluate import rejudge
    from safegene.evaluation.tables import agreement_markdown, answers_markdown, evaluation_markdown

    if (run is None) == (agreement is None):
        raise typer.BadParameter("give a run folder, a file of answers, or --agreement with a folder of labelled sets.")
    rows = answers.read(run) if run is not None and run.is_file() else []  # before a judge is loaded
    result: dict[str, Any]
    with progress_bars() as progress:
        chosen = judges.load(judge)
        if agreement is not None:
            found = people.measure(chosen, public.resolve(str(agreement)), out, progress)
            result = {
                "judge": chosen.name,
                "sets": [asdict(a) for a in found],
                "by_rules": sum(a.by_rules for a in found),
            }
            text = agreement_markdown(result)
        elif run is not None and rows:
            result = answers.judge(run, rows, chosen, progress)
            text = answers_markdown(result)
        else:
            assert run is not None
            result = rejudge(run, chosen, progress)
            text = evaluation_markdown(result)
    if unfinished := result.get("unfinished"):
        stderr.print(
            f"safegene: left out, because cut off: {', '.join(unfinished)}; run the same safegene eval again to finish.",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    if as_json:
        print(json.dumps(result))
    else:
        Console().print(text, markup=False, highlight=False, soft_wrap=True)
