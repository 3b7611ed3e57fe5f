"""Places for results, looked at and made before the work whose results they will hold."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from safegene.errors import DataError


def prepare_folder(path: Path) -> None:
    """Make the folder, and try whether it takes a file.

    Raises:
        DataError: it is a file, or nothing can be written there.
    """
    if path.exists() and not path.is_dir():
        raise DataError(f"{path} is a file; give a folder.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}); give another place, or mend this one."
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all: an interrupted run finds what was there before."""
    part = path.with_suffix(".partial")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def prepare_file(path: Path) -> None:
    """Make the file's folder, and try whether the file can be written there; it is not made yet.

    Raises:
        DataError: it is a folder, or nothing can be written there.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder; give the path of a file.")
    prepare_folder(path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise DataError(f"{path} cannot be written; give another path, or make it writable.")
