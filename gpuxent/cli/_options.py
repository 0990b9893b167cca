"""Options and formats that several commands share."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from typing import Any

import typer

SOURCES = (
    "a .npy, .safetensors, .h5, .parquet or .kld file, a Zarr v3 folder, a folder or glob of files; FILE::NAME inside"
)


def panel(title: str) -> Any:
    """Options under a heading of their own in the help."""
    return partial(typer.Option, rich_help_panel=title)


reading, counting, scoring = panel("Input"), panel("Which tokens count"), panel("Statistics")
keeping, computing, writing = panel("Keeping a run"), panel("Where it is computed"), panel("Result")


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Integers with commas between."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} must be integers with commas between, got {text!r}") from None


class Format(StrEnum):
    table = "table"
    json = "json"


class TableFormat(StrEnum):
    table = "table"
    json = "json"
    markdown = "markdown"


class ResultFormat(StrEnum):
    table = "table"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"
    markdown = "markdown"


class ComparisonFormat(StrEnum):
    table = "table"
    json = "json"
    csv = "csv"
    markdown = "markdown"
