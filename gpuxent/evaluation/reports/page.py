"""A report as one HTML file that needs no network: numbers, figures, documents, and the text token by token.

What comes from data (names, tokens) is escaped by Jinja, or handed to the page as JSON that its script puts in as text;
the content security policy allows that one script only, by its hash, and no connection.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gpuxent import __version__
from gpuxent.evaluation.comparison import report as comparison_report
from gpuxent.evaluation.comparison.kept import read_pair_tokens
from gpuxent.evaluation.reports import cards, tables
from gpuxent.evaluation.reports.figures.chosen import figures
from gpuxent.evaluation.reports.figures.figure import to_csv, to_html_svg
from gpuxent.evaluation.reports.figures.style import PALETTE
from gpuxent.evaluation.reports.reported import Reported, ReportedComparison, ReportedRun
from gpuxent.evaluation.reports.tables import decimal
from gpuxent.evaluation.reports.text import Reader, Text, document_name, shown_text, text_data
from gpuxent.evaluation.reports.vocabulary import Vocabulary
from gpuxent.evaluation.runs.directory import read_tokens
from gpuxent.evaluation.statistics.tokens import Tokens
from gpuxent.evaluation.statistics.totals import exp

FOLDER = Path(__file__).parent / "page"
SHOWN_DOCUMENTS = 1000


@dataclass(frozen=True)
class Cell:
    text: str
    value: float | str | None = None  # what the column is sorted by; None: the text


def render(
    reported: Reported,
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
    runs, text = reported.runs, _text(reported, tokens)
    called = partial(document_name, names=document_names)
    drawn = [
        {
            "name": figure.name,
            "title": figure.title,
            "description": figure.description,
            "svg": Markup(to_html_svg(figure)),  # its texts are escaped
            "csv": "data:text/csv;base64," + base64.b64encode(to_csv(figure).encode()).decode(),
        }
        for figure in figures(runs, reported.comparisons)
    ]
    documents = [_documents(run, called, len(runs) > 1) for run in runs if run.result.by_document]
    parts = {"results": "Results", "figures": "Figures", "documents": "Documents", "text": "Text"}
    there = {"results": True, "figures": drawn, "documents": documents, "text": text}
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html.jinja").render(
        title=title,
        subtitle=_subtitle(reported),
        version=__version__,
        palette=PALETTE,
        css=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        parts=[(anchor, name) for anchor, name in parts.items() if there[anchor]],
        models=[
            *(_of_run(run, called) for run in runs),
            *(_of_comparison(found, called) for found in reported.comparisons),
        ],
        figures=drawn,
        documents=documents,
        text=None if text is None else text_data(text, vocabulary, called),
        text_notes=[] if text is None else list(_notes(text)),
        least={"low": 0, "high": 15} if text is None or len(text.names) == 1 else {"low": -5, "high": 15},
    )


def _subtitle(reported: Reported) -> str:
    runs = (
        f"{run.name}: {run.result.scored:,} tokens scored"
        + ("" if run.result.documents is None else f" in {run.result.documents:,} documents")
        for run in reported.runs
    )
    comparisons = (f"{found.name}: {found.result.scored:,} tokens compared" for found in reported.comparisons)
    return "; ".join([*runs, *comparisons])


def _of_run(run: ReportedRun, called: Callable[[int], str]) -> dict[str, Any]:
    unfinished = [tables.partly(run.result.share)] if run.result.share < 1 else []
    return {
        "name": run.name,
        "lead": [],
        "warnings": [*unfinished, *tables.warnings(run.result)],
        "cards": list(cards.of_run(run)),
        "sections": list(tables.sections(run.result, called)),
        "about": [(key, str(value)) for key, value in run.about.items()],
    }


def _of_comparison(found: ReportedComparison, called: Callable[[int], str]) -> dict[str, Any]:
    _, *warnings, verdict = comparison_report.lines(found.result)
    unfinished = [tables.partly(found.result.share)] if found.result.share < 1 else []
    return {
        "name": found.name,
        "lead": [f"Base: {found.base}. Other: {found.other}.", verdict],
        "warnings": [*unfinished, *warnings],
        "cards": list(cards.of_comparison(found.result)),
        "sections": list(comparison_report.sections(found.result, called)),
        "about": [(key, str(value)) for key, value in found.about.items()],
    }


def _documents(run: ReportedRun, called: Callable[[int], str], several: bool) -> dict[str, Any]:
    found = run.result.by_document
    assert found is not None
    shown = found.worst(min(SHOWN_DOCUMENTS, len(found)))
    note = f"The {len(shown):,} of {len(found):,} with the largest mean loss." if len(shown) < len(found) else ""
    rows = [
        (
            Cell(called(d.document)),
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


def _text(reported: Reported, limit: int) -> Text | None:
    """Of the runs that keep their tokens, and of both sides of comparisons; None if there is none."""
    models: list[tuple[str, Reader]] = [
        (run.name, partial(read_tokens, run.path)) for run in reported.runs if run.running is not None
    ]
    for found in reported.comparisons:
        models += [(f"{found.name}: {side}", partial(_side, found.path, side)) for side in ("base", "other")]
    return shown_text(models, limit)


def _side(path: Path, side: str) -> Iterator[Tokens]:
    return (tokens.side(side) for tokens in read_pair_tokens(path))


def _notes(text: Text) -> Iterator[str]:
    shown = len(text.tokens[0])
    if shown < text.scored:
        yield (
            f"{shown:,} of {text.scored:,} tokens, in whole stretches: half of them those in which {text.names[0]} has "
            "the largest mean loss, the others from the beginning."
        )
    for name in text.missing:
        yield f"{name} is not among the models here: it scored other tokens, or these with other labels."
