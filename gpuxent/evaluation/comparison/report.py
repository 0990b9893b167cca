"""How a comparison is shown, under llama.cpp's names for what it prints too."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from gpuxent.evaluation.comparison.result import ChangedDocument, ChangedToken, Comparison, Estimate
from gpuxent.evaluation.reports.records import CSV_COLUMNS
from gpuxent.evaluation.reports.tables import Section, decimal, error, partly, percent, write_text
from gpuxent.evaluation.statistics.result import finite

FORMS = ("table", "json", "csv", "markdown")
SHOWN = 5  # documents and tokens, each way
LEVELS = {1.0: "maximum", 0.5: "median", 0.0: "minimum"}


def write(result: Comparison, form: str, about: dict[str, Any], file: TextIO, width: int | None = None) -> None:
    """The comparison in one of FORMS; `about` says of what, in JSON.

    Raises: ValueError: an unknown form.
    """
    if form == "json":
        file.write(json.dumps(result.to_dict() | {"run": finite(about)}, indent=2, allow_nan=False, default=str) + "\n")
    elif form == "csv":
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        writer.writerows(_csv_lines(result))
    elif form in ("table", "markdown"):
        write_text(lines(result), sections(result), form, file, width)
    else:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")


def lines(result: Comparison) -> Iterator[str]:
    documents = [] if result.documents is None else [f"docs {result.documents:,}"]
    partial = [partly(result.share)] if result.share < 1 else []
    mixed = [f"mixed: {len(result.mixed)} backends or CPU types"] if result.mixed else []
    yield "  ".join([*partial, f"scored {result.scored:,}", f"bad {result.bad:,}", *documents, *mixed])
    for computed_by in result.mixed:
        yield f"mixed: rows computed by {computed_by}"
    if result.bad:
        yield f"a loss is NaN or infinite in {result.bad:,} of them, first row {result.first_bad_row:,}"
    yield verdict(result)


def verdict(result: Comparison) -> str:
    """The answer in a sentence."""
    if result.scored == 0:
        return "No token counts: there is nothing to compare."
    change, by = result.log_ratio, "documents"
    stderr = change.stderr_cluster
    if stderr is None:
        stderr, by = change.stderr_iid, "tokens"
    if not math.isfinite(change.value):
        return "The losses are not all finite: their means say nothing."
    if change.value == 0 == stderr:
        return "The two models have the same losses."
    which = "worse" if change.value > 0 else "better"
    size = f"other is {which} than base by {decimal(abs(change.value))} nats per token"
    if not stderr > 0:
        return f"{size}; there are too few {by} for an error."
    return f"{size}, {abs(change.value) / stderr:.1f} standard errors ({by} taken as independent)."


def estimates(r: Comparison) -> Iterator[tuple[str, str, Estimate]]:
    """(name, how to show it, the estimate)"""
    yield "cross-entropy(base)", "nat", r.base
    yield "cross-entropy(other)", "nat", r.other
    yield "PPL(base)", "", r.base_perplexity
    yield "PPL(other)", "", r.other_perplexity
    yield "ln(PPL(other)/PPL(base))", "nat", r.log_ratio
    yield "PPL(other)/PPL(base)", "", r.ratio
    yield "PPL(other)-PPL(base)", "", r.difference
    yield "mean Δp", "%", r.delta_p
    yield "RMS Δp", "%", r.delta_p_rms
    for name, how, estimate in (
        ("mean KLD(base||other)", "nat", r.kl),
        ("mean KLD(other||base)", "nat", r.reverse_kl),
        ("mean JS divergence", "nat", r.js),
        ("mean total variation", "%", r.tv),
        ("same top class", "%", r.same_top),
    ):
        if estimate is not None:
            yield name, how, estimate


def sections(result: Comparison, called: Callable[[int], str] = str) -> Iterator[Section]:
    """What tables show. `called` names a document by its id."""
    clustered = result.documents is not None
    heads = ("", "value", *(["± cluster(doc)"] if clustered else []), "± iid")
    rows = [(name, *_shown(how, estimate, clustered)) for name, how, estimate in estimates(result)]
    blank = [""] * (len(heads) - 2)
    rows.append(("correlation of the losses", decimal(result.correlation), *blank))
    rows.append(("entropy(base)", f"{decimal(result.base_entropy)} nat", *blank))
    rows.append(("entropy(other)", f"{decimal(result.other_entropy)} nat", *blank))
    yield Section("", heads, rows)
    shares = [
        ("both", result.both_right),
        ("only base", result.only_base_right),
        ("only other", result.only_other_right),
        ("neither", result.neither_right),
    ]
    total = result.scored or math.nan
    right = [(name, f"{count:,}", percent(count / total)) for name, count in shares]
    yield Section("Whose most probable class is the label", ("", "tokens", "share"), right)
    yield _quantiles(result)
    for title, documents in (
        ("Worse documents", result.worse_documents),
        ("Better documents", result.better_documents),
    ):
        if documents:
            yield _documents(title, documents[:SHOWN], called)
    for title, tokens in (("Worse tokens", result.worse_tokens), ("Better tokens", result.better_tokens)):
        if tokens:
            yield _tokens(title, tokens[:SHOWN], called)


def _shown(how: str, estimate: Estimate, clustered: bool) -> list[str]:
    factor = 100 if how == "%" else 1
    numbers = [estimate.stderr_cluster] if clustered else []
    errors = [error(None if value is None else factor * value) for value in (*numbers, estimate.stderr_iid)]
    unit = f" {how}" if how else ""
    return [f"{decimal(factor * estimate.value)}{unit}", *errors]


def _quantiles(result: Comparison) -> Section:
    kl = result.kl_quantiles
    rows = [
        (_level(q), f"{100 * value:+.4f} %", *([] if kl is None else [f"{kl[q]:#.4g}"]))
        for q, value in result.delta_p_quantiles.items()
    ]
    heads = ("quantile", "Δp", *([] if kl is None else ["KLD(base||other), nats"]))
    note = f"within {percent(result.quantile_error)}" if result.quantile_error else ""
    return Section("Of tokens; Δp is the change of the label's probability", heads, rows, note)


def _level(q: float) -> str:
    return LEVELS.get(q, f"{100 * q:g} %")


def _documents(title: str, documents: tuple[ChangedDocument, ...], called: Callable[[int], str]) -> Section:
    rows = [
        (called(d.document), f"{d.scored:,}", decimal(d.base), decimal(d.other), f"{d.other - d.base:+.4g}")
        for d in documents
    ]
    return Section(title, ("document", "scored", "base", "other", "change, nats per token"), rows)


def _tokens(title: str, tokens: tuple[ChangedToken, ...], called: Callable[[int], str]) -> Section:
    rows = [
        (
            f"{t.row:,}",
            f"{t.label:,}",
            "-" if t.document is None else called(t.document),
            decimal(t.base),
            decimal(t.other),
            f"{t.other - t.base:+.4g}",
        )
        for t in tokens
    ]
    return Section(title, ("row", "label", "document", "base", "other", "change, nats"), rows)


def _csv_lines(r: Comparison) -> Iterator[tuple[Any, ...]]:
    for name in (
        "base",
        "other",
        "base_perplexity",
        "other_perplexity",
        "log_ratio",
        "ratio",
        "difference",
        "delta_p",
        "delta_p_rms",
        "kl",
        "reverse_kl",
        "js",
        "tv",
        "same_top",
    ):
        estimate = getattr(r, name)
        if estimate is not None:
            yield "result", "", name, estimate.value, estimate.stderr_cluster, estimate.stderr_iid, r.scored
    for name in ("correlation", "base_entropy", "other_entropy"):
        yield "result", "", name, getattr(r, name), None, None, r.scored
    for name in (
        "scored",
        "bad",
        "first_bad_row",
        "documents",
        "rows",
        "share",
        "both_right",
        "only_base_right",
        "only_other_right",
    ):
        yield "result", "", name, getattr(r, name), None, None, None
    for level, value in r.delta_p_quantiles.items():
        yield "quantile", level, "delta_p", value, None, None, r.scored
    for level, value in (r.kl_quantiles or {}).items():
        yield "quantile", level, "kl", value, None, None, r.scored
    for d in (*r.worse_documents, *r.better_documents):
        for side in ("base", "other"):
            yield "document", d.document, f"{side}_cross_entropy", getattr(d, side), None, None, d.scored
    for t in (*r.worse_tokens, *r.better_tokens):
        for side in ("base", "other"):
            yield "token", t.row, f"{side}_nll", getattr(t, side), None, None, 1
