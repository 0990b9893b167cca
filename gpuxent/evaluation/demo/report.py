"""What the demonstration prints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from gpuxent.evaluation.calibration.checking import CalibrationCheck
from gpuxent.evaluation.calibration.temperature import TemperatureFit
from gpuxent.evaluation.comparison.result import Comparison
from gpuxent.evaluation.demo.corpus import Corpus
from gpuxent.evaluation.demo.model import Settings, Trained
from gpuxent.evaluation.progress import duration
from gpuxent.evaluation.reports.tables import decimal, error, percent
from gpuxent.evaluation.statistics.documents import Document
from gpuxent.evaluation.statistics.result import Evaluation
from gpuxent.evaluation.statistics.totals import exp

SHOWN_DOCUMENTS = 5
SHOWN_TOKENS = 10
MIN_SCORED = 20  # tokens of a document that is shown: the mean of fewer says little
BEFORE = 26  # characters of context


@dataclass(frozen=True)
class Scored:
    """The held-out tokens and what is known of them; `loss` and `logits` have a row per held-out token, in order."""

    corpus: Corpus
    result: Evaluation
    loss: np.ndarray
    baselines: dict[str, float]
    logits: np.ndarray


def show_corpus(corpus: Corpus, out: Console) -> None:
    held = int(corpus.held_out.sum())
    unknown = float(np.mean(corpus.tokens[corpus.held_out] == 0))
    cut = " (what comes after them is left out)" if corpus.cut else ""
    show(
        out,
        f"Text: {corpus.title}, {len(corpus.names):,} documents, {len(corpus.words):,} tokens{cut}. The end of every "
        f"document is held out: {held:,} tokens, {percent(unknown)} of them <unk>. "
        f"Vocabulary: {len(corpus.vocab):,} words and punctuation marks.",
    )


def show_training(trained: Trained, settings: Settings, out: Console) -> None:
    parameters = sum(value.size for value in vars(trained.model).values())
    early = trained.steps < trained.planned
    why = f" (the machine is busy: stopped after {trained.steps:,} of {trained.planned:,} steps)" if early else ""
    show(
        out,
        f"Model: log-bilinear, {settings.context} words of context, dimension {settings.dimension}, {parameters:,} "
        f"parameters, trained in {duration(trained.seconds)} with gpuxent.linear_cross_entropy_and_grad{why}.",
    )


def show_files(folder: Path, kept: bool, out: Console) -> None:
    size = (folder / "logits.npy").stat().st_size / 1e6
    note = "" if kept else " (deleted at the end; --output keeps them)"
    show(out, f"Held-out logits: {size:.0f} MB of float16 in {folder}{note}")


def show(out: Console, text: str) -> None:
    out.print(text, markup=False, highlight=False)


def tables(scored: Scored) -> Iterator[RenderableType]:
    yield models_table(scored)
    result = scored.result
    yield Text(
        f"Model: accuracy {percent(result.accuracy)}, top-5 accuracy {percent(result.topk_accuracy[5])}, "
        f"calibration error (ECE) {decimal(result.ece)}"
    )
    documents = scored.result.by_document or ()
    ranked = sorted((d for d in documents if d.scored >= MIN_SCORED), key=lambda d: d.cross_entropy)
    names = scored.corpus.names
    if len(ranked) > 2 * SHOWN_DOCUMENTS:
        yield documents_table("Best documents", ranked[:SHOWN_DOCUMENTS], names)
        yield documents_table("Worst documents", ranked[: -SHOWN_DOCUMENTS - 1 : -1], names)
    elif ranked:
        yield documents_table("Documents, best first", ranked, names)
    yield surprises_table(scored)


def show_comparison(found: Comparison, bits: int, out: Console) -> None:
    """The answer of `gpuxent compare` in two sentences."""
    assert found.kl is not None
    assert found.kl_quantiles is not None
    assert found.same_top is not None
    change, stderr = found.log_ratio.value, found.log_ratio.stderr_cluster
    show(
        out,
        f"\nWith its weights rounded to {bits} bits, by gpuxent.compare: cross-entropy {change:+.4f} nats per token "
        f"(standard error {error(stderr)}), perplexity {decimal(found.base_perplexity.value)} -> "
        f"{decimal(found.other_perplexity.value)}. KL divergence {decimal(found.kl.value)} nats per token, 99 % of the "
        f"tokens below {found.kl_quantiles[0.99]:.2g}; the same most probable word in {percent(found.same_top.value)}.",
    )


def show_calibration(found: CalibrationCheck[TemperatureFit] | str, out: Console) -> None:
    """The answer of `gpuxent calibrate` in a sentence."""
    if isinstance(found, str):
        show(out, f"\nNo temperature was fitted: {found}.")
        return
    before, after = (
        f"{ece.value:.3g} ({ece.low:.3g} to {ece.high:.3g})" for ece in (found.before.ece, found.after.ece)
    )
    show(
        out,
        f"\nDivided by a temperature of {found.fit.temperature:.4f}, by gpuxent.calibration: calibration error (ECE, "
        f"with {100 * found.before.level:g} % intervals) {before} -> {after}, cross-entropy "
        f"{found.before.nll.value:.4f} -> {found.after.nll.value:.4f}, on the {found.before.documents:,} documents "
        "that the temperature was not fitted to.",
    )


def show_report(path: Path | None, out: Console) -> None:
    if path is None:
        show(out, "\nWith the extra `report` installed, all this would also be an HTML page to look at.")
    else:
        out.print("\nA page of all this, with the text token by token:", highlight=False, markup=False)
        out.print(f"  {path}", highlight=False, markup=False, soft_wrap=True)  # one line, to be copied


def models_table(scored: Scored) -> Table:
    table = new_table(f"{scored.result.scored:,} held-out tokens")
    table.add_column("model")
    for heading in ("nats per token", "perplexity", "bits per token"):
        table.add_column(heading, justify="right")
    for name, loss in {"log-bilinear": scored.result.cross_entropy, **scored.baselines}.items():
        table.add_row(name, f"{loss:.4f}", f"{exp(loss):,.2f}", f"{loss / math.log(2):.4f}")
    return table


def documents_table(title: str, documents: Sequence[Document], names: Sequence[str]) -> Table:
    table = new_table(f"{title} (of at least {MIN_SCORED} held-out tokens)")
    table.add_column("document")  # what gives way on a narrow terminal
    for heading in ("tokens", "nats per token", "perplexity"):
        table.add_column(heading, justify="right", no_wrap=True)
    for d in documents:
        table.add_row(
            Text(shorten(names[d.document], 36)),
            f"{d.scored:,}",
            f"{d.cross_entropy:.4f}",
            f"{exp(d.cross_entropy):,.2f}",
        )
    return table


def surprises_table(scored: Scored) -> Table:
    """The tokens of the largest losses. <unk> is left out: it is no word, and what stood there was never seen."""
    corpus = scored.corpus
    table = new_table("Most surprising tokens")
    table.add_column("nats", justify="right", no_wrap=True)
    table.add_column("document")
    table.add_column("after", justify="right")
    table.add_column("came", style="bold", no_wrap=True)
    table.add_column("expected", no_wrap=True)
    places = np.flatnonzero(corpus.held_out)
    for row in most_surprising(scored.loss, corpus.tokens[places], SHOWN_TOKENS):
        place = int(places[row])
        name = corpus.names[corpus.document[place]]
        expected = corpus.vocab[int(np.argmax(scored.logits[row]))]
        cells = (shorten(name, 12), words_before(corpus, place), shorten(corpus.words[place], 12), shorten(expected, 9))
        table.add_row(f"{scored.loss[row]:.2f}", *map(Text, cells))
    return table


def most_surprising(loss: np.ndarray, labels: np.ndarray, count: int) -> list[int]:
    """The rows of the largest losses, the largest first, without those of <unk>."""
    known = np.flatnonzero(labels != 0)
    return known[np.argsort(-loss[known], kind="stable")[:count]].tolist()


def words_before(corpus: Corpus, place: int) -> str:
    """The end of what the document says before a token, in BEFORE characters."""
    start = max(int(np.searchsorted(corpus.document, corpus.document[place])), place - BEFORE)
    text = " ".join(corpus.words[start:place])
    return shorten(text[::-1], BEFORE)[::-1]


def shorten(text: str, width: int) -> str:
    """At most so many columns of a terminal, which are not characters in every script."""
    cut = Text(text)
    cut.truncate(width, overflow="ellipsis")
    return cut.plain


def new_table(title: str) -> Table:
    return Table(title=title, title_justify="left")
