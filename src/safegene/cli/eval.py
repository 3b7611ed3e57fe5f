"""safegene eval"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from safegene.cli._run import progress_bars
from safegene.models import EMBEDDED

OWN = "safetyeval,over_refusal,multi_turn,code,medical,legal,finance"


def command(
    model: Annotated[str, typer.Option(help="Model: folder, embedded name or hub id.")] = EMBEDDED,
    adapter: Annotated[str, typer.Option(help="Adapter to attach: folder, shipped name or hub id.")] = "",
    suite: Annotated[
        str,
        typer.Option(
            help="Comma-separated suites (see --list). The default leaves out the public sets, and jailbreak: 40 requests in every "
            "wrapper, and the judge rules reads English only."
        ),
    ] = OWN,
    judge: Annotated[str, typer.Option(help="Judge (see safegene judge --help).")] = "rules",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder, file or hub id of the public sets; or of one of them, as SUITE=PLACE. May be given several times."
        ),
    ] = None,
    n: Annotated[int, typer.Option(min=0, help="Samples of a suite at most; 0 takes all.")] = 0,
    wrap: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Put this many requests of each suite, 0 for all, into every jailbreak wrapper instead of asking them as they are.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=8, help="New tokens of an answer at most.")] = 128,
    out: Annotated[Path, typer.Option(help="Where texts and figures are kept; run again to go on.")] = Path(
        "safetyeval"
    ),
    min_safety: Annotated[
        float, typer.Option(min=0, max=1, help="Exit with 1 when the safety score of a suite lies under this share.")
    ] = 0,
    max_over_refusal: Annotated[
        float, typer.Option(min=0, max=1, help="Exit with 1 when the over-refusal of a suite lies over this share.")
    ] = 1,
    list_suites: Annotated[bool, typer.Option("--list", help="List the suites and their sizes, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, nothing else.")] = False,
) -> None:
    """Measure a model's safety and its over-refusal, with or without an adapter."""
    from safegene.evaluation import public_suites
    from safegene.evaluation import suite as suites
    from safegene.evaluation.evaluate import evaluate
    from safegene.evaluation.scores import missed
    from safegene.evaluation.tables import evaluation_markdown, suites_markdown
    from safegene.evaluation.wrappers import WRAPPERS

    if list_suites:
        listed = [
            {
                "suite": s.name, "about": s.about, "samples": len(made := s.make()),
                "harmful": sum(x.harmful for x in made), "harmless": sum(not x.harmful for x in made),
                "categories": len({x.category for x in made}), "wrappers": len(around := {x.wrapper for x in made} - {""}),
                "families": len({WRAPPERS[name].family for name in around}), "content": suites.CONTENT_VERSION,
            }
            for s in suites.suites()
        ]  # fmt: skip
        public = [{"suite": p.name, "about": p.about, "hub": p.hub} for p in public_suites.PUBLIC.values()]
        if as_json:
            print(json.dumps({"suites": listed, "public": public}))
        else:
            Console().print(suites_markdown(listed, public), markup=False, highlight=False, soft_wrap=True)
        return
    with progress_bars() as progress:
        result = evaluate(
            model, [name.strip() for name in suite.split(",")], out, judge=judge, adapter=adapter, data=public_suites.places(data or []),
            n=n, wrap=wrap, tokens=tokens, progress=progress,
        )  # fmt: skip
    if as_json:
        print(json.dumps(result))
    else:
        Console().print(evaluation_markdown(result), markup=False, highlight=False, soft_wrap=True)
    if lines := missed(result["suites"], min_safety, max_over_refusal):
        for line in lines:
            print(f"safegene eval: threshold missed, {line}", file=sys.stderr)
        raise typer.Exit(1)
