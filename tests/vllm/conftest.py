"""References made once, and figures kept for docs/results/vllm.md."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from harness import HERE, LIMIT, ROOT, RUNS, Prepared, installed, run

FIGURES = RUNS / "figures.json"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.timeout(3 * LIMIT))
            if not installed():
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make test-vllm"))


@pytest.fixture(scope="session")
def prepared() -> Prepared:
    """dtype → the references, made where the files they depend on have changed."""
    sources = [
        *(ROOT / "src/safegene").glob("*.py"),
        *(ROOT / "src/safegene/adapters").rglob("safegene_*"),
        HERE / "prepare.py",
    ]
    version = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(sources))).hexdigest()[:12]

    def prepare(dtype: str) -> dict[str, Any]:
        folder = RUNS / version
        if not (folder / f"reference-{dtype}.json").exists():
            done = run([sys.executable, str(HERE / "prepare.py"), str(folder), "--dtype", dtype])
            assert done.returncode == 0, done.stdout[-3000:]
        found: dict[str, Any] = json.loads((folder / f"reference-{dtype}.json").read_text())
        return {**found, "calibration": str(folder / f"calibration-{dtype}.safetensors")}

    return prepare


@pytest.fixture(scope="session")
def reference(prepared: Prepared) -> dict[str, Any]:
    return prepared("float32")


@pytest.fixture
def figures() -> Iterator[dict[str, Any]]:
    """What this test measured, added to what others did; written after each, for the whole takes longer than one may want to wait."""
    found: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    yield found
    FIGURES.parent.mkdir(parents=True, exist_ok=True)
    FIGURES.write_text(json.dumps(found, indent=1) + "\n")
