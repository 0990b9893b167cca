"""How a result is shown: tables for people, on a terminal or in Markdown, and records for programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpuxent.evaluation.reports.records import position_name, statistics, write_csv, write_json, write_jsonl
from gpuxent.evaluation.statistics.documents import Document
from gpuxent.evaluation.statistics.result import Evaluation
from gpuxent.evaluation.statistics.totals import exp

FORMS = ("table", "json", "jsonl", "csv", "markdown")
SHOWN_DOCUMENTS = 5  # of the best, and of the worst
SHOWN_GROUPS = 20
NARROWEST = 80  # columns that the tables need
NAME_WIDTH = 12  # of the first column, where that does not suffice; longer names go on in the next line
ASCII = str.maketrans({"±": "+-", "Δ": "d"})
NAMES = {
    "cross_entropy": "cross-entropy",
    "perplexity": "perplexity",
    "document_cross_entropy": "mean over documents",
    "bits_per_token": "bits per token",
    "bits_per_byte": "bits per byte",
    "bits_per_word": "bits per word",
    "word_perplexity": "word perplexity",
    "entropy": "entropy of the model",
}


@dataclass(frozen=True)
class Section:
    """A table: the first column names things, the others have numbers."""

    title: str
    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""

    def map(self, change: Callable[[str], str]) -> Section:
        rows = [tuple(map(change, row)) for row in self.rows]
        return Section(change(self.title), tuple(map(change, self.heads)), rows, change(self.note))


def write(result: Evaluation, form: str, run: dict[str, Any], file: TextIO, width: int | None = None) -> None:
    """The result in one of FORMS; `run` says what was scored and how: all of it in JSON, its "source" and "shift" in
    the first line of tables. `width` is that of the terminal: by default what it has, or 80 columns.

    Raises: ValueError: an unknown form.
    """
    if form == "json":
        write_json(result, run, file)
    elif form == "jsonl":
        write_jsonl(result, run, file)
    elif form == "csv":
        write_csv(result, file)
    elif form in ("table", "markdown"):
        write_text((first_line(result, run), *warnings(result)), sections(result), form, file, width)
    else:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")


def write_text(
    lines: Iterable[str], parts: Iterable[Section], form: str, file: TextIO, width: int | None = None
) -> None:
    """Lines and tables as a "table" for terminals, or as "markdown"."""
    lines = [_encodable(line, file) for line in lines]
    parts = [section.map(lambda text: _encodable(text, file)) for section in parts]
    if form == "table":
        _print(lines, parts, file, width)
    else:
        file.write("\n\n".join([*lines, *map(_markdown, parts)]) + "\n")


def _encodable(text: str, file: TextIO) -> str:
    """The text in characters that the file can write, some terminals know ASCII only, and that do nothing else."""
    if not text.isprintable():
        text = text.encode("unicode_escape").decode()
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(ASCII).encode(encoding, "backslashreplace").decode(encoding)
    return text


def _print(lines: list[str], parts: list[Section], file: TextIO, width: int | None) -> None:
    console = Console(file=file, width=width, highlight=False, emoji=False)
    console.width = max(console.width, NARROWEST)
    with console.capture() as captured:
        for line in lines:
            console.print(Text(line))
        for section in parts:
            _print_section(section, console)
    for line in captured.get().splitlines():
        file.write(line.rstrip() + "\n")


def _print_section(section: Section, console: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    justify: Literal["left", "right"] = "right" if section.title else "left"
    table.add_column(Text(section.heads[0]), overflow="fold")
    for head in section.heads[1:]:
        table.add_column(Text(head), justify=justify, no_wrap=True)
    for row in section.rows:
        table.add_row(*map(Text, row))
    names, *digits = (max(map(len, column)) for column in zip(section.heads, *section.rows, strict=True))
    needed = min(names, NAME_WIDTH) + sum(2 + width for width in digits)
    if needed > console.width:  # a digit is never cut off: the terminal wraps the line
        table.width = needed
    console.print()
    if section.title:
        console.print(Text(section.title))
    console.print(table, crop=False)
    if section.note:
        console.print(Text(section.note))


def _markdown(section: Section) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("\\", "\\\\").replace("|", "\\|") for cell in cells) + " |"

    rule = line(["---", *["---:"] * (len(section.heads) - 1)])
    table = "\n".join([line(section.heads), rule, *map(line, section.rows)])
    return "\n\n".join(part for part in (section.title, table, section.note) if part)


def first_line(result: Evaluation, run: dict[str, Any]) -> str:
    """How much is in the numbers, and of what."""
    parts = [f"scored {result.scored:,}", f"ignored {result.ignored:,}"]
    parts.append(f"bad {result.nan_rows + result.infinite_rows:,}")
    if result.share < 1:
        parts.insert(0, partly(result.share))
    if result.documents is not None:
        parts.append(f"docs {result.documents:,}")
    if run.get("source"):
        parts.append(f"from {run['source']}")
    if run.get("shift") is not None:
        parts.append(f"shift {run['shift']}")
    if result.mixed:
        parts.append(f"mixed: {len(result.mixed)} backends or CPU types")
    return "  ".join(parts)


def partly(share: float) -> str:
    return f"partial: {math.floor(1000 * share) / 10:.1f} % of the rows"  # 99.99 % are not all


def warnings(result: Evaluation) -> Iterator[str]:
    yield from bad_rows(result)
    for computed_by in result.mixed:
        yield f"mixed: rows computed by {computed_by}"


def bad_rows(result: Evaluation) -> list[str]:
    """What there is to warn of: these rows decide the mean."""
    lines = []
    if result.nan_rows:
        lines.append(f"{_rows_have(result.nan_rows)} a loss of NaN, first row {result.first_nan_row:,}")
    if result.infinite_rows:
        lines.append(f"{_rows_have(result.infinite_rows)} an infinite loss, first row {result.first_infinite_row:,}")
    return lines


def _rows_have(count: int) -> str:
    return "1 row has" if count == 1 else f"{count:,} rows have"


def sections(result: Evaluation, called: Callable[[int], str] = str) -> Iterator[Section]:
    """What tables show: the means first, and of documents and groups only some. `called` names a document by its id."""
    yield _means(result)
    if result.quantiles and result.scored:
        heads = ("quantile", *(f"{100 * level:g} %" for level in result.quantiles))
        title = f"Loss of tokens, nats (within {percent(result.quantile_error)})"
        losses = (f"{nll:.{2 if nll < 1e-4 else 3}g}" for nll in result.quantiles.values())  # as many as fit in a line
        yield Section(title, heads, [("loss", *losses)])
    if result.by_position:
        yield _positions(result)
    if result.groups:
        yield _groups(result)
    if result.by_document:
        if len(result.by_document) > 2 * SHOWN_DOCUMENTS:
            yield _documents("Best documents", result.by_document.best(SHOWN_DOCUMENTS), called)
            yield _documents("Worst documents", result.by_document.worst(SHOWN_DOCUMENTS), called)
        else:
            yield _documents("Documents, best first", result.by_document.best(len(result.by_document)), called)


def _means(result: Evaluation) -> Section:
    by_document = result.stderr_cluster is not None
    rows = []
    for name, value, cluster, iid in statistics(result):
        if value is None:
            continue
        label, shown = _label(name, result), decimal(value)
        if "accuracy" in name:
            shown = percent(value)
        elif name in ("cross_entropy", "document_cross_entropy", "entropy"):
            shown += " nat"
        rows.append((label, shown, *([error(cluster)] if by_document else []), error(iid)))
    heads = ("", "value", *(["± cluster(doc)"] if by_document else []), "± iid")
    return Section("", heads, rows)


def _label(name: str, result: Evaluation) -> str:
    if name == "ece":
        return f"calibration error (ECE, {len(result.bins)} bins)"
    if "accuracy" in name:
        return f"top-{name.removeprefix('top').removesuffix('_accuracy')} accuracy" if name[0] == "t" else "accuracy"
    return NAMES[name]


def _positions(result: Evaluation) -> Section:
    rows = [
        (position_name(p.first, p.last), f"{p.scored:,}", decimal(p.cross_entropy), error(p.stderr_iid))
        for p in result.by_position
    ]
    return Section(
        "By position (rows before the token in its document)", ("position", "scored", "cross-entropy", "± iid"), rows
    )


def _groups(result: Evaluation) -> Section:
    shown = sorted(result.groups, key=lambda group: -group.scored)[:SHOWN_GROUPS]
    units = [unit for unit in ("byte", "word") if any(getattr(g, f"bits_per_{unit}") is not None for g in shown)]
    rows = [
        (
            g.group or "(blank)",
            f"{g.documents:,}",
            f"{g.scored:,}",
            decimal(g.cross_entropy),
            error(g.stderr_cluster),
            decimal(g.perplexity),
            *(decimal(getattr(g, f"bits_per_{unit}")) for unit in units),
        )
        for g in shown
    ]
    heads = ("group", "docs", "scored", "nats", "± cluster", "perplexity", *(f"bits/{unit}" for unit in units))
    more = len(result.groups) - len(shown)
    note = f"and {more:,} more groups with fewer tokens: the formats json, jsonl and csv have all" if more else ""
    return Section("By group", heads, rows, note)


def _documents(title: str, documents: list[Document], called: Callable[[int], str]) -> Section:
    rows = [
        (called(d.document), f"{d.scored:,}", decimal(d.cross_entropy), decimal(exp(d.cross_entropy)))
        for d in documents
    ]
    return Section(title, ("document", "scored", "cross-entropy", "perplexity"), rows)


def decimal(value: float) -> str:
    """Six significant digits, but all digits before the point."""
    if not math.isfinite(value):
        return {math.inf: "inf", -math.inf: "-inf"}.get(value, "NaN")
    if abs(value) >= 1e6:
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.5e}"
    return f"{value:,.6g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.2e}"


def error(value: float | None) -> str:
    """A standard error in two significant digits."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "inf" if value > 0 else "n/a"
    return f"{value:#.2g}".removesuffix(".") if value < 100 else decimal(float(f"{value:.2g}"))


def percent(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{100 * value:.2f} %"
