"""`gpuxent inspect` and `gpuxent convert`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gpuxent.cli._console import bad_input_exits, console, say, written_to
from gpuxent.cli._options import SOURCES, Format


def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help=f"Logits, labels or document ids: {SOURCES}.")],
    labels: Annotated[str | None, typer.Option(help="Labels (...): do they fit these logits?")] = None,
    ignore_index: Annotated[int, typer.Option(help="Label of tokens that do not count.")] = -100,
    format: Annotated[Format, typer.Option(help="A table for people or JSON for programs.")] = Format.table,
) -> None:
    """What a file holds, what its values look like, and the time and memory that perplexity would take."""
    from gpuxent.evaluation.files import inspect

    with bad_input_exits():
        facts = inspect.facts(path, labels, ignore_index)
        with written_to(None) as file:
            if format is Format.json:
                file.write(json.dumps(facts, indent=2, allow_nan=False) + "\n")
            else:
                console(file=file).print(inspect.to_table(facts))
        if problem := facts.get("labels", {}).get("problem"):
            raise ValueError(problem)


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help=f"What to copy: {SOURCES}.")],
    out: Annotated[
        str,
        typer.Argument(metavar="OUT", help="A .npy, .zarr, .safetensors, .h5, .parquet, .kld file; FILE::NAME inside."),
    ],
    to: Annotated[str | None, typer.Option(help="The format, if OUT does not end in it: npy, zarr, ..., kld.")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="For .kld: the tokens (windows, n_ctx) whose second halves the rows are of.")
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(help="Rows per chunk (.zarr, .h5) or row group (.parquet); default: 16 MiB, .h5 in one piece."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT, with all that is in it.")] = False,
) -> None:
    """Copy an array into another format, block by block and bit for bit (.kld: log-probabilities in 16 bits)."""
    from gpuxent.evaluation.files.convert import convert
    from gpuxent.evaluation.sources import open_source

    with bad_input_exits():
        array = open_source(source)
        for warning in array.warnings():
            say(f"warning: {warning}")
        beside = None if tokens is None else open_source(tokens)
        done = convert(array, out, console(stderr=True), to=to, tokens=beside, rows=rows, overwrite=overwrite)
        with written_to(None) as file:
            file.write(f"{done}\n")
