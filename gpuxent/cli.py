"""The command line. Results go to stdout, all else to stderr; exit codes: 0 done, 2 usage, 3 bad input."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

from gpuxent import __version__

BAD_INPUT = 3

app = typer.Typer(
    help="Cross-entropy and perplexity over huge vocabularies.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Format(StrEnum):
    table = "table"
    json = "json"


@app.command()
def perplexity(
    logits: Annotated[
        Path,
        typer.Argument(metavar="LOGITS", readable=False, help="Logits (..., vocab): a .npy file or a Zarr v3 folder."),
    ],
    labels: Annotated[
        Path, typer.Option(readable=False, help="Labels (...), integers: a .npy file or a Zarr v3 folder.")
    ],
    documents: Annotated[
        Path | None,
        typer.Option(readable=False, help="Document ids (...), integers: adds the best and worst documents."),
    ] = None,
    ignore_index: Annotated[int, typer.Option(help="Label of tokens that do not count.")] = -100,
    temperature: Annotated[float, typer.Option(help="Divide the logits by this.")] = 1.0,
    format: Annotated[Format, typer.Option(help="A table for people or JSON for programs.")] = Format.table,
    output: Annotated[Path | None, typer.Option(help="Write the result to this file instead of stdout.")] = None,
) -> None:
    """Cross-entropy, perplexity, accuracy, entropy and calibration of stored logits, read block by block."""
    from gpuxent import _arguments
    from gpuxent.evaluation import report
    from gpuxent.evaluation.score import score_files

    with bad_input_exits():
        _arguments.number(temperature, "--temperature", 0, open_low=True)
        check_writable(output, logits, labels, documents)
        options: dict[str, Any] = {"ignore_index": ignore_index, "temperature": temperature}
        totals, by_document = score_files(logits, labels, documents, Console(stderr=True), **options)
        if totals.scored == 0:
            all_ignored = f"{totals.ignored:,} labels, all {ignore_index} (ignored)"
            raise ValueError(f"no token to score: {labels} has {all_ignored if totals.ignored else 'no labels'}")
        result = totals.result()
        for warning in report.bad_rows(result):
            say(f"warning: {warning}")
        with written_to(output) as file:
            if format is Format.json:
                run = {"gpuxent": __version__, "logits": logits, "labels": labels, "documents": documents, **options}
                file.write(report.to_json(result, by_document, run) + "\n")
            else:
                Console(file=file, width=80 if output else None).print(report.to_table(result, by_document))


@app.command()
def demo(
    text: Annotated[
        Path | None, typer.Option(readable=False, help="A text file (UTF-8) instead of Python's language reference.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Keep the logits, labels and document ids in this folder.")
    ] = None,
) -> None:
    """Train a small language model on real text for under a minute, write its logits, and score the files."""
    from gpuxent.evaluation.demo import run_demo

    with bad_input_exits():
        run_demo(text, output, out=Console(), progress=Console(stderr=True))


@app.command()
def info(
    format: Annotated[Format, typer.Option(help="A table for people or JSON for programs.")] = Format.table,
) -> None:
    """Versions, the GPUs, the backends found, and which would be used."""
    from gpuxent import _info

    facts = _info.facts()
    if format is Format.json:
        print(json.dumps(facts, indent=2))
    else:
        Console().print(_info.to_table(facts))


@contextmanager
def bad_input_exits() -> Iterator[None]:
    """What the library or the system says of bad input goes to stderr in one line, without a traceback."""
    try:
        yield
    except BrokenPipeError:  # `| head` has seen enough
        raise
    except (ValueError, TypeError, IndexError, OSError) as error:
        say(one_line(error))
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(130) from None


def say(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"gpuxent: {text}", markup=False)


def one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:  # without its "[Errno 2]"
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split("\n")).strip()


def check_writable(output: Path | None, *inputs: Path | None) -> None:
    """Find out before the work, not after it; and never write over what is read."""
    if output is None:
        return
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"--output must be a file in an existing folder, got {output}")
    if not os.access(output if output.exists() else output.parent, os.W_OK):
        raise ValueError(f"--output must be a file that may be written, got {output}")
    if output.exists() and any(path is not None and path.exists() and output.samefile(path) for path in inputs):
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


def show_version(value: bool) -> None:
    if value:
        typer.echo(f"gpuxent {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=show_version, is_eager=True),
    ] = False,
) -> None:
    """Cross-entropy and perplexity over huge vocabularies."""


def main() -> None:
    app()
