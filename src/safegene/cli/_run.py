"""Running a verb: one clear line for every error, exit codes, a progress line on stderr."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import safegene.progress
from safegene.errors import SafegeneError

stderr = Console(stderr=True)


@contextlib.contextmanager
def progress_bars() -> Iterator[safegene.progress.Progress]:
    """Draw stages on stderr: a bar with an estimate for each that can be counted, a pulse for the others."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=stderr) as bars:

        def start(stage: str, total: int = 0) -> safegene.progress.Advance:
            for task in bars.task_ids:
                bars.stop_task(task)
            task = bars.add_task(stage, total=total or None)
            return lambda units: bars.advance(task, units)

        yield start


def run(verb: str, command: Callable[..., None], arguments: list[str]) -> int:
    """Run `command` through typer; returns the exit code."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    # transformers' own bars and advice would drown ours, and stdout belongs to results.
    warnings.filterwarnings("ignore", module=r"(transformers|torch|peft|accelerate)\..*")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    import transformers.utils.logging as noise

    quiet: Any = noise
    quiet.disable_progress_bar()
    try:
        code: Any = app(arguments, prog_name=f"safegene {verb}", standalone_mode=False)
        return int(code or 0)
    except SafegeneError as error:
        print(f"safegene: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("safegene: interrupted; run the same command again to go on.", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        # torch says so in a RuntimeError, on the CPU and on a GPU.
        if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
            raise
        print(
            f"safegene {verb}: out of memory; give a smaller model or a machine with more. What is finished is kept.",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        print(f"safegene: {error}; check path, permissions and free space.", file=sys.stderr)
        return 1
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            print(f"safegene {verb}: {error.format_message()} See safegene {verb} --help.", file=sys.stderr)
            return 2
        raise
