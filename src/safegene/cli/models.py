"""safegene models"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from safegene import hub
from safegene.models import EMBEDDED, embedded_state


def command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the models and adapters that are on this machine."""
    found = [{"name": EMBEDDED, "kind": "model", "state": embedded_state()}]
    for name in hub.shipped():
        found.append({"name": name, "kind": "adapter", "state": f"for {hub.load_config(name).base_model}"})
    if as_json:
        print(json.dumps(found))
        return
    for row in found:
        print(f"{row['kind']:<8} {row['name']:<28} {row['state']}")
