"""A report as one HTML file that needs no network: numbers, figures, documents, and the text token by token.

What comes from data (names, tokens) is escaped by Jinja, or handed to the page as JSON that its script puts in as text;
the content security policy allows that one script only, by its hash, and no connection.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gpuxent import __version__
from gpuxent.evaluation.reports import tables
from gpuxent.evaluation.reports.figures.chosen import figures
from gpuxent.evaluation.reports.figures.figure import to_csv, to_html_svg
from gpuxent.evaluation.reports.figures.style import PALETTE, Z95
from gpuxent.evaluation.reports.reported import ReportedRun
from gpuxent.evaluation.reports.tables import decimal, percent
from gpuxent.evaluation.reports.text import Text, document_name, shown_text, text_data
from gpuxent.evaluation.reports.vocabulary import Vocabulary
from gpuxent.evaluation.runs.directory import read_tokens
from gpuxent.evaluation.statistics.result import Evaluation
from gpuxent.evaluation.statistics.totals import exp

FOLDER = Path(__file__).parent / "page"
SHOWN_DOCUMENTS = 1000


@dataclass(frozen=True)
class Card:
    """A headline number."""

    name: str
    value: str
    interval: str = ""


@dataclass(frozen=True)
class Cell:
    text: str
    value: float | str | None = None  # what the column is sorted by; None: the text


def render(
    runs: Sequence[ReportedRun],
    *,
    title: str,
    vocabulary: Vocabulary,
    document_names: Sequence[str] | None = None,
    tokens: int = 20_000,
) -> str:
    """The page. About so many `tokens` of the text are shown; `document_names` are in the order of the ids.

    Raises: ValueError: a label that the vocabulary lacks; ImportError: jinja2 or matplotlib is missing.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise ImportError("a report needs jinja2: pip install 'gpuxent[report]'") from error
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    text = _text(runs, tokens)
    drawn = [
        {
            "name": figure.name,
            "title": figure.title,
            "description": figure.description,
            "svg": Markup(to_html_svg(figure)),  # its texts are escaped
            "csv": "data:text/csv;base64," + base64.b64encode(to_csv(figure).encode()).decode(),
        }
        for figure in figures(runs)
    ]
    documents = [_documents(run, document_names, len(runs) > 1) for run in runs if run.result.by_document]
    parts = {"results": "Results", "figures": "Figures", "documents": "Documents", "text": "Text"}
    there = {"results": True, "figures": drawn, "documents": documents, "text": text}
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html.jinja").render(
        title=title,
        subtitle=_subtitle(runs),
        version=__version__,
        palette=PALETTE,
        css=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        parts=[(anchor, name) for anchor, name in parts.items() if there[anchor]],
        models=[_model(run) for run in runs],
        figures=drawn,
        documents=documents,
        text=None if text is None else text_data(text, vocabulary, document_names),
        text_notes=[] if text is None else list(_notes(text)),
        least={"low": 0, "high": 15} if text is None or len(text.names) == 1 else {"low": -5, "high": 15},
    )


def _subtitle(runs: Sequence[ReportedRun]) -> str:
    return "; ".join(
        f"{run.name}: {run.result.scored:,} tokens scored"
        + (f" in {run.result.documents:,} documents" if run.result.documents is not None else "")
        for run in runs
    )


def _model(run: ReportedRun) -> dict[str, Any]:
    return {
        "name": run.name,
        "cards": list(_cards(run)),
        "sections": list(tables.sections(run.result)),
        "warnings": list(_warnings(run)),
        "about": [(key, str(value)) for key, value in run.about.items()],
    }


def _cards(run: ReportedRun) -> Iterator[Card]:
    result = run.result
    stderr = result.stderr_iid if result.stderr_cluster is None else result.stderr_cluster
    low, high = result.cross_entropy - Z95 * stderr, result.cross_entropy + Z95 * stderr
    by = "independent tokens" if result.stderr_cluster is None else "by document"
    yield Card("Cross-entropy, nats", decimal(result.cross_entropy), _interval(low, high, by))
    yield Card("Perplexity", decimal(result.perplexity), _interval(exp(low), exp(high), by))
    for unit in ("byte", "word"):
        bits, error = getattr(result, f"bits_per_{unit}"), getattr(result, f"bits_per_{unit}_stderr")
        if bits is not None:
            interval = "" if error is None else _interval(bits - Z95 * error, bits + Z95 * error, by)
            yield Card(f"Bits per {unit}", decimal(bits), interval)
    yield Card("Accuracy", percent(result.accuracy), "" if run.reliability is None else _accuracy(run))
    if run.reliability is None:
        yield Card("Calibration error (ECE)", decimal(result.ece))
    else:
        ece = run.reliability.ece
        yield Card("Calibration error (ECE)", decimal(ece.value), _interval(ece.low, ece.high, "bootstrap"))
    yield Card("Tokens scored", f"{result.scored:,}", f"{result.ignored:,} ignored")


def _accuracy(run: ReportedRun) -> str:
    assert run.reliability is not None
    accuracy = run.reliability.accuracy
    return f"{percent(accuracy.low)} to {percent(accuracy.high)}, bootstrap"


def _interval(low: float, high: float, by: str) -> str:
    return "" if math.isnan(low) or math.isnan(high) else f"{decimal(_short(low))} to {decimal(_short(high))}, {by}"


def _short(value: float) -> float:
    """Five significant digits are as many as an interval lets one read."""
    return float(f"{value:.5g}")


def _warnings(run: ReportedRun) -> Iterator[str]:
    result: Evaluation = run.result
    if result.share < 1:
        yield f"partial: {math.floor(1000 * result.share) / 10:.1f} % of the rows are scored"
    yield from tables.warnings(result)


def _documents(run: ReportedRun, names: Sequence[str] | None, several: bool) -> dict[str, Any]:
    found = run.result.by_document
    assert found is not None
    shown = found.worst(min(SHOWN_DOCUMENTS, len(found)))
    note = f"The {len(shown):,} of {len(found):,} with the largest mean loss." if len(shown) < len(found) else ""
    rows = [
        (
            Cell(document_name(d.document, names)),
            Cell(f"{d.scored:,}", d.scored),
            Cell(decimal(d.cross_entropy), d.cross_entropy),
            Cell(decimal(exp(d.cross_entropy)), exp(d.cross_entropy)),
        )
        for d in shown
    ]
    return {
        "title": f"Documents of {run.name}" if several else "Documents",
        "note": note,
        "heads": ("document", "tokens", "cross-entropy, nats", "perplexity"),
        "sorted_by": "cross-entropy, nats",
        "rows": rows,
    }


def _text(runs: Sequence[ReportedRun], limit: int) -> Text | None:
    """Of the runs that keep their tokens; None if none does."""
    return shown_text([(run.name, partial(read_tokens, run.path)) for run in runs if run.running is not None], limit)


def _notes(text: Text) -> Iterator[str]:
    shown = len(text.tokens[0])
    if shown < text.scored:
        yield (
            f"{shown:,} of {text.scored:,} tokens, in whole stretches: half of them those in which {text.names[0]} has "
            "the largest mean loss, the others from the beginning."
        )
    for name in text.missing:
        yield f"{name} is not among the models here: it scored other tokens, or these with other labels."
