"""`gpuxent demo` and `gpuxent info`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gpuxent.cli._console import bad_input_exits, console
from gpuxent.cli._options import Format


def demo(
    text: Annotated[
        Path | None, typer.Option(readable=False, help="A text file (UTF-8) instead of Python's language reference.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Keep the logits, labels and document ids in this folder.")
    ] = None,
) -> None:
    """Train a small language model on real text for under a minute, write its logits, and score the files."""
    from gpuxent.evaluation.demo.demonstrate import run_demo

    with bad_input_exits():
        run_demo(text, output, out=console(), progress=console(stderr=True))


def info(
    format: Annotated[Format, typer.Option(help="A table for people or JSON for programs.")] = Format.table,
) -> None:
    """Versions, the GPUs, the backends found, and which would be used."""
    from gpuxent import _info

    facts = _info.facts()
    if format is Format.json:
        print(json.dumps(facts, indent=2))
    else:
        console().print(_info.to_table(facts))
