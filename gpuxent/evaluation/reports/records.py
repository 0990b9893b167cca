"""A result for programs: JSON in one object, JSON lines of records, and CSV in long form."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, TextIO

from gpuxent.evaluation.statistics.result import Evaluation, finite

CSV_COLUMNS = ("kind", "name", "statistic", "value", "stderr_cluster", "stderr_iid", "count")
LISTS = ("bins", "by_position", "groups", "quantiles")


def write_json(result: Evaluation, run: dict[str, Any], file: TextIO) -> None:
    """One object, with a line for each document: there may be millions, and they are never all text at once."""
    head = json.dumps(
        result.to_dict(by_document=False) | {"run": finite(run)}, indent=2, allow_nan=False, default=str
    ).removesuffix("\n}")
    file.write(head)
    if result.by_document is not None:
        file.write(',\n  "by_document": [')
        separator = "\n    "
        for document in result.by_document:
            file.write(separator + json.dumps(finite(asdict(document)), allow_nan=False))
            separator = ",\n    "
        file.write("\n  ]" if len(result.by_document) else "]")
    file.write("\n}\n")


def write_jsonl(result: Evaluation, run: dict[str, Any], file: TextIO) -> None:
    """One object per line, whose "kind" says what it is of."""
    for record in records(result, run):
        file.write(json.dumps(finite(record), allow_nan=False, default=str) + "\n")


def records(result: Evaluation, run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What was scored, the result, and its quantiles, positions, bins, groups and documents."""
    yield {"kind": "run", **run}
    numbers = result.to_dict(by_document=False)
    yield {"kind": "result", **{name: value for name, value in numbers.items() if name not in LISTS}}
    for level, nll in result.quantiles.items():
        yield {"kind": "quantile", "q": level, "nll": nll, "relative_error": result.quantile_error}
    for kind, items in (
        ("position", result.by_position),
        ("bin", result.bins),
        ("group", result.groups),
        ("document", result.by_document or ()),
    ):
        for item in items:
            yield {"kind": kind, **asdict(item)}


def write_csv(result: Evaluation, file: TextIO) -> None:
    """A line per number, with the standard errors it has and the count it is of (tokens; rows of a share); NaN and inf
    are `nan` and `inf`, and what is not known is empty."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows(_csv_lines(result))


def _csv_lines(result: Evaluation) -> Iterator[tuple[Any, ...]]:
    for name, value, cluster, iid in statistics(result):
        yield "result", "", name, value, cluster, iid, result.scored
    for name in ("scored", "ignored", "nan_rows", "first_nan_row", "infinite_rows", "first_infinite_row", "documents"):
        yield "result", "", name, getattr(result, name), None, None, None
    yield "result", "", "share", result.share, None, None, result.rows
    for name in result.mixed:
        yield "result", "", "mixed", name, None, None, None
    for level, nll in result.quantiles.items():
        yield "quantile", level, "nll", nll, None, None, result.scored
    for p in result.by_position:
        yield "position", position_name(p.first, p.last), "cross_entropy", p.cross_entropy, None, p.stderr_iid, p.scored
    for b in result.bins:
        for statistic in ("accuracy", "confidence"):
            yield "bin", f"({b.lower:.6g}, {b.upper:.6g}]", statistic, getattr(b, statistic), None, None, b.count
    for g in result.groups:
        yield "group", g.group, "cross_entropy", g.cross_entropy, g.stderr_cluster, None, g.scored
        yield "group", g.group, "perplexity", g.perplexity, g.perplexity * g.stderr_cluster, None, g.scored
        for statistic in ("documents", "bits_per_byte", "bits_per_word"):
            yield "group", g.group, statistic, getattr(g, statistic), None, None, g.scored
    for d in result.by_document or ():
        yield "document", d.document, "cross_entropy", d.cross_entropy, None, None, d.scored


def statistics(r: Evaluation) -> Iterator[tuple[str, float | None, float | None, float | None]]:
    """(name, value, standard error by document, of independent tokens): None where there is none.

    An error of exp(x) is exp(x) times that of x.
    """
    cluster, iid, ln2 = r.stderr_cluster, r.stderr_iid, math.log(2)
    yield "cross_entropy", r.cross_entropy, cluster, iid
    yield "perplexity", r.perplexity, times(cluster, r.perplexity), times(iid, r.perplexity)
    yield "document_cross_entropy", r.document_cross_entropy, r.document_stderr, None
    yield "bits_per_token", r.bits_per_token, times(cluster, 1 / ln2), times(iid, 1 / ln2)
    yield "bits_per_byte", r.bits_per_byte, r.bits_per_byte_stderr, None
    yield "bits_per_word", r.bits_per_word, r.bits_per_word_stderr, None
    yield "word_perplexity", r.word_perplexity, times(times(r.bits_per_word_stderr, ln2), r.word_perplexity), None
    for k, share in r.topk_accuracy.items():
        yield ("accuracy" if k == 1 else f"top{k}_accuracy"), share, None, None
    yield "entropy", r.entropy, None, None
    yield "ece", r.ece, None, None


def times(error: float | None, factor: float | None) -> float | None:
    return None if error is None or factor is None else error * factor


def position_name(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
