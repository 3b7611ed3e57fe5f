"""Names for what is kept, by what it was made of: other code, other text, another name. Nothing old is ever taken for new."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent

Place = str | Path | Callable[..., Any]
"""A file or folder of the package, or one function of it."""


def digest(places: Iterable[Place], *said: object) -> str:
    """Short digest of places, with what else is said. Of Python, what it runs counts: comments and docstrings may be reworded."""
    found = hashlib.sha256(repr(said).encode())
    for place in places:
        where = PACKAGE / place if isinstance(place, str | Path) else place
        if not isinstance(where, Path) or where.suffix == ".py":
            found.update(_code(where))
        else:
            for file in [where] if where.is_file() else sorted(f for f in where.rglob("*") if f.is_file()):
                found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()[:12]


@functools.cache
def _code(place: Path | Callable[..., Any]) -> bytes:
    """Read once: what is edited while a build runs is not what runs."""
    source = place.read_text(encoding="utf-8") if isinstance(place, Path) else inspect.getsource(place)
    tree = ast.parse(textwrap.dedent(source))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            body[:] = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    return ast.dump(tree).encode()
