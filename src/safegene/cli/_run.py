"""Running a verb: one clear line for every error, exit codes, a progress line on stderr."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError

import safegene.progress
from safegene.errors import SafegeneError

GOES_ON = ("train", "fold", "results", "eval", "judge", "zoo", "bench")
"""Verbs that keep what is finished: the same command goes on from there."""

stderr = Console(stderr=True)


class _Interrupted(Exception):
    """Ctrl-C inside a verb, on its way through typer, which would make an exit code of it and say nothing."""


SHOWN = 4
"""Stages that stay on the screen: a bench has more than a thousand."""


@contextlib.contextmanager
def progress_bars() -> Iterator[safegene.progress.Progress]:
    """Draw the last stages on stderr: a bar with an estimate for each that can be counted, a pulse for the others. Where stderr is
    no terminal, one line a stage, when it starts: a log tells where a long run is."""
    if not stderr.is_terminal:
        yield _logged
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=stderr) as bars:

        def start(stage: str, total: int = 0) -> safegene.progress.Advance:
            for earlier in bars.task_ids:
                bars.stop_task(earlier)
            for earlier in bars.task_ids[: 1 - SHOWN]:
                bars.remove_task(earlier)
            task = bars.add_task(stage, total=total or None)

            def advance(units: int) -> None:
                if task in bars.task_ids:  # a stage may go on after others have pushed it off the screen
                    bars.advance(task, units)

            return advance

        yield start


def _logged(stage: str, total: int = 0) -> safegene.progress.Advance:
    print(f"{time.strftime('%H:%M:%S')} {stage}{f' ({total})' if total else ''}", file=sys.stderr, flush=True)
    return lambda units: None


def run(verb: str, command: Callable[..., None], arguments: list[str]) -> int:
    """Run `command` through typer; returns the exit code."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(_interruptible(command))
    try:
        _quiet()
        code: Any = app(arguments, prog_name=f"safegene {verb}", standalone_mode=False)
        return int(code or 0)
    except (KeyboardInterrupt, _Interrupted):
        goes_on = verb in GOES_ON
        return _say(verb, f"interrupted; {'run the same command again to go on' if goes_on else 'nothing is kept'}.")
    except SafegeneError as error:
        print(f"safegene: {error}", file=sys.stderr)
        return 1
    except (OSError, SafetensorError) as error:
        return _say(verb, f"{' '.join(str(error).split())}; check path, permissions and free space.")
    except (MemoryError, RuntimeError) as error:
        # torch's words for a disk that does not take a checkpoint; the second as it closes the file that the first left broken
        if any(word in str(error) for word in ("PytorchStreamWriter", "inline_container", "unexpected pos")):
            return _say(verb, "a checkpoint could not be written; check free space.")
        # torch says so in a RuntimeError, on the CPU and on a GPU.
        if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
            raise
        kept = " What is finished is kept." if verb in GOES_ON else ""
        return _say(verb, f"out of memory; give a smaller model or a machine with more.{kept}")
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            print(f"safegene {verb}: {error.format_message()} See safegene {verb} --help.", file=sys.stderr)
            return 2
        raise


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt as error:
            raise _Interrupted from error

    return wrapped


def _quiet() -> None:
    """The libraries' own bars and advice would drown ours, and stdout belongs to results."""
    warnings.filterwarnings("ignore", module=r"(transformers|torch|peft|accelerate)\..*")
    for name in ("transformers", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers.utils.logging as noise

    quiet: Any = noise
    quiet.disable_progress_bar()


def _say(verb: str, what: str) -> int:
    print(f"safegene {verb}: {what}", file=sys.stderr)
    return 1
