"""Scoring of stored logits with a report of progress: the main job of the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from gpuxent.evaluation.documents import DocumentTotals
from gpuxent.evaluation.driver import Block, check_sources, score_blocks
from gpuxent.evaluation.progress import Progress
from gpuxent.evaluation.sources import ZarrSource, open_source
from gpuxent.evaluation.totals import Totals


def score_files(
    logits_path: Path,
    labels_path: Path,
    documents_path: Path | None,
    progress_to: Console,
    *,
    on_block: Callable[[Block], None] | None = None,
    **options: Any,
) -> tuple[Totals, DocumentTotals | None]:
    """Totals of the data set, and per document if ids are given; `on_block` sees every block in order."""
    logits, labels = open_source(logits_path), open_source(labels_path)
    documents = None if documents_path is None else open_source(documents_path)
    check_sources(logits, labels, documents)
    for source in (logits, labels, documents):
        if isinstance(source, ZarrSource) and source.missing_chunks:
            warning = f"{source.name}: {source.missing_chunks:,} chunks are not stored and read as the fill value"
            progress_to.print(f"gpuxent: warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    totals, by_document = Totals.identity(), None if documents is None else DocumentTotals()
    with Progress(int(np.prod(logits.shape[:-1])), "rows", progress_to) as progress:
        for block in score_blocks(logits, labels, documents, **options):
            totals = totals.with_rows(block.scores, block.numbers)
            if by_document is not None and block.documents is not None:
                by_document.add(block.scores, block.documents)
            if on_block is not None:
                on_block(block)
            progress.advance(
                block.rows, f"cross-entropy {totals.mean_loss:.4f}" if totals.scored else "nothing scored yet"
            )
    return totals, by_document
