"""What goes to the terminal or into a file, what becomes of errors, and how far the work has come."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TextIO

import typer
from rich.console import Console

BAD_INPUT, INTERRUPTED = 3, 4

console = partial(Console, emoji=False)  # ":rock:" in the name of a file stays what it is


@contextmanager
def bad_input_exits() -> Iterator[None]:
    """What the library or the system says of bad input goes to stderr in one line, without a traceback."""
    try:
        yield
    except (BrokenPipeError, typer.Exit):  # `| head` has seen enough; an exit is a RuntimeError, too
        raise
    except (ValueError, TypeError, IndexError, ImportError, OSError, RuntimeError) as error:
        say(one_line(error))
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt:
        say("stopped")
        sys.stdout.flush()
        os._exit(INTERRUPTED)  # Python would wait for the threads whose blocks nobody wants any more


@contextmanager
def said_warnings() -> Iterator[None]:
    """What the library warns of goes to stderr in one line each."""
    with warnings.catch_warnings(record=True, action="always", category=UserWarning) as caught:
        yield
    for warning in caught:
        say(f"warning: {warning.message}")


def say(text: str) -> None:
    console(stderr=True, highlight=False, soft_wrap=True).print(f"gpuxent: {text}", markup=False)


def one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:  # without its "[Errno 2]"
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split("\n")).strip()


@contextmanager
def row_progress(rows: int, console: Console, note: Callable[[Any], str]) -> Iterator[Callable[[int, Any], None]]:
    """A watch for `score` that shows how many rows are done, and what is noted of the summary so far."""
    from gpuxent.evaluation.progress import Progress

    with Progress(rows, "rows", console) as progress:

        def watch(done: int, summary: Any) -> None:
            progress.advance(done, note(summary))

        yield watch


@contextmanager
def pass_progress(rows: int, console: Console) -> Iterator[Callable[[str], Callable[[int], None]]]:
    """The same of several passes over the rows, one after the other: a watch for each, by its name."""
    from gpuxent.evaluation.progress import Progress

    numbers = count(1)
    with Progress(rows, "rows", console) as progress:

        def begin(name: str) -> Callable[[int], None]:
            progress.again(f"pass {next(numbers)}: {name}")
            return progress.advance

        yield begin


def check_writable(output: Path | None, *inputs: str | Path | None) -> None:
    """Find out before the work, not after it; and never write over what is read."""
    if output is None:
        return
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"--output must be a file in an existing folder, got {output}")
    if not os.access(output if output.exists() else output.parent, os.W_OK):
        raise ValueError(f"--output must be a file that may be written, got {output}")
    paths = [Path(path) for path in inputs if path is not None]
    if output.exists() and any(path.exists() and output.samefile(path) for path in paths):
        raise ValueError(f"--output must not be one of the inputs, got {output}")


@contextmanager
def written_to(output: Path | None) -> Iterator[TextIO]:
    """The file, or stdout; an error, such as a full disk, says which."""
    try:
        if output is None:
            yield sys.stdout
            sys.stdout.flush()
        else:
            with output.open("w", encoding="utf-8") as file:
                yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        if output is None:  # what is still buffered would fail again when Python exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(f"{output or 'stdout'} cannot be written: {error.strerror}") from error
