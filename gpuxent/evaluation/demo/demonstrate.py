"""The demonstration: train a small language model on real text, store its logits, and score the files.

Everything after the training is what `gpuxent perplexity` does with any model's files.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from rich.console import Console

from gpuxent.evaluation.calibration.checking import CalibrationCheck
from gpuxent.evaluation.calibration.fitting import check_temperature
from gpuxent.evaluation.calibration.temperature import TemperatureFit
from gpuxent.evaluation.comparison.compare import compare
from gpuxent.evaluation.comparison.result import Comparison
from gpuxent.evaluation.demo import report as demo_report
from gpuxent.evaluation.demo.corpus import Corpus, reference_corpus, text_corpus
from gpuxent.evaluation.demo.model import LogBilinear, Settings, Trained, log_unigram, train
from gpuxent.evaluation.demo.report import Scored
from gpuxent.evaluation.driver import BLOCK_BYTES, ThreadWorkers, plan, rows_per_block, run_blocks
from gpuxent.evaluation.evaluate import evaluate, linear_logits, open_job
from gpuxent.evaluation.progress import Progress
from gpuxent.losses import cross_entropy

FILES = ("logits.npy", "labels.npy", "documents.npy", "vocabulary.txt", "documents.txt")
RUNS = ("model", "rounded")
REPORT = "report.html"
ROWS_AT_ONCE = 1024  # of logits in float32 while they are written
ROUNDED_BITS = 4


def run_demo(
    text: Path | None, output: Path | None, *, out: Console, progress: Console, settings: Settings | None = None
) -> None:
    """Train on `text` (UTF-8; default: Python's language reference), write the held-out logits, score them.

    Results go to the console `out`, progress to `progress`. The files go into the folder `output`, or into a temporary
    one, of which the report alone is left at the end. ValueError: a text that is too small or no UTF-8, or an output
    folder that has such files.
    """
    settings = settings or Settings()
    corpus = reference_corpus() if text is None else text_corpus(text)
    with output_folder(output) as folder:
        demo_report.show_corpus(corpus, out)
        trained = train_model(corpus, settings, progress)
        demo_report.show_training(trained, settings, out)
        write_files(trained.model, corpus, settings, folder)
        demo_report.show_files(folder, kept=output is not None, out=out)
        scored = score(folder, corpus, progress)
        for table in demo_report.tables(scored):
            out.print()
            out.print(table)
        runs = kept_runs(folder)
        demo_report.show_comparison(compare_rounded(trained.model, corpus, settings, folder, runs), ROUNDED_BITS, out)
        demo_report.show_calibration(calibrated(folder), out)
        demo_report.show_report(write_report(corpus, folder, runs), out)
        if output is not None:
            demo_report.show(out, "\nScore the files again:")
            out.print(f"  {command(folder)}", highlight=False, markup=False, soft_wrap=True)  # one line, to be copied


@contextmanager
def output_folder(output: Path | None) -> Iterator[Path]:
    """The folder for the files: the user's, made if need be and never overwriting, or a temporary one, of which only
    the report stays."""
    if output is None:
        folder = Path(tempfile.mkdtemp(prefix="gpuxent-demo-"))
        try:
            yield folder
        finally:
            discard(folder)
        return
    output.mkdir(parents=True, exist_ok=True)
    there = [name for name in (*FILES, *RUNS, REPORT) if (output / name).exists()]
    if there:
        raise ValueError(f"{output} already has {there[0]}; give a new or empty folder")
    yield output


def discard(folder: Path) -> None:
    """All of it but the report."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != REPORT:
            path.unlink()
    with suppress(OSError):  # there is one
        folder.rmdir()


def train_model(corpus: Corpus, settings: Settings, console: Console) -> Trained:
    """A model of the training part of the corpus."""
    places = np.flatnonzero(~corpus.held_out)
    contexts, labels = corpus.contexts(places, settings.context), corpus.tokens[places]
    vocab = len(corpus.vocab)
    running = 0.0
    with Progress(settings.steps(len(labels), vocab), "steps", console) as progress:

        def on_step(epoch: int, loss: float) -> None:
            nonlocal running
            running = 0.99 * running + 0.01 * loss if running else loss
            progress.advance(1, f"epoch {epoch}, training loss {running:.3f}")

        return train(contexts, labels, vocab, settings, on_step)


def write_files(model: LogBilinear, corpus: Corpus, settings: Settings, folder: Path) -> None:
    """The held-out rows in the order of the text. The logits are float16, as large models mostly store them."""
    places = np.flatnonzero(corpus.held_out)
    contexts = corpus.contexts(places, settings.context)
    shape = (len(places), len(corpus.vocab))
    logits = np.lib.format.open_memmap(folder / "logits.npy", mode="w+", dtype=np.float16, shape=shape)
    for start in range(0, len(places), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        logits[rows] = model.logits(contexts[rows])
    logits.flush()
    np.save(folder / "labels.npy", corpus.tokens[places])
    np.save(folder / "documents.npy", corpus.document[places])
    (folder / "vocabulary.txt").write_text("".join(f"{word}\n" for word in corpus.vocab), encoding="utf-8")
    (folder / "documents.txt").write_text("".join(f"{name}\n" for name in corpus.names), encoding="utf-8")


def score(folder: Path, corpus: Corpus, console: Console) -> Scored:
    """What the stored logits say: statistics, each document's, each token's loss, and the baselines."""
    logits, labels, documents = (folder / name for name in FILES[:3])
    job = replace(open_job(logits, labels, documents=documents), keep_tokens=True)
    summary, loss = job.identity(), np.zeros(job.rows)
    with Progress(job.rows, "rows", console) as progress:
        blocks = plan([range(job.rows)], rows_per_block(job, BLOCK_BYTES))
        for block in run_blocks(job, blocks, ThreadWorkers(job.rows)):
            summary = summary.merge(block.summary)
            assert block.tokens is not None
            loss[block.tokens.row] = block.tokens.nll
            progress.advance(block.rows, f"cross-entropy {summary.totals.mean_loss:.4f}")
    return Scored(corpus, summary.result(), loss, baselines(corpus), np.load(logits, mmap_mode="r"))


def kept_runs(folder: Path) -> tuple[Path, Path] | None:
    """Where the report's runs are kept; None where what they need is not installed."""
    wanted = ("pyarrow", "matplotlib", "jinja2")
    return None if None in map(find_spec, wanted) else (folder / RUNS[0], folder / RUNS[1])


def compare_rounded(
    model: LogBilinear, corpus: Corpus, settings: Settings, folder: Path, runs: tuple[Path, Path] | None
) -> Comparison:
    """The stored logits with those of a copy with few bits per weight, which are never stored."""
    contexts, other = corpus.contexts(np.flatnonzero(corpus.held_out), settings.context), model.rounded(ROUNDED_BITS)
    logits, labels, documents = (folder / name for name in FILES[:3])
    rounded = linear_logits(other.hidden(contexts), other.classifier, other.bias)
    return compare(logits, rounded, labels, documents=documents, run=runs and runs[1])


def write_report(corpus: Corpus, folder: Path, runs: tuple[Path, Path] | None) -> Path | None:
    """The page of the model and of the comparison."""
    if runs is None:
        return None
    from gpuxent.evaluation.reports.page import render
    from gpuxent.evaluation.reports.reported import open_reported
    from gpuxent.evaluation.reports.vocabulary import Words

    logits, labels, documents = (folder / name for name in FILES[:3])
    evaluate(logits, labels, documents=documents, run=runs[0])
    words = Words(FILES[3], corpus.vocab)
    page = render(open_reported(runs), title=corpus.title, vocabulary=words, document_names=corpus.names)
    path = folder / REPORT
    path.write_text(page, encoding="utf-8")
    return path


def calibrated(folder: Path) -> CalibrationCheck[TemperatureFit] | str:
    """A temperature for the stored logits, fitted to half of the documents and checked on the others; or why there is
    none, as for a text of few."""
    logits, labels, documents = (folder / name for name in FILES[:3])
    try:
        return check_temperature(logits, labels, documents=documents)
    except ValueError as error:
        return str(error)


def baselines(corpus: Corpus) -> dict[str, float]:
    """Cross-entropy of the held-out tokens, nats, under models that see no context."""
    labels, vocab = corpus.tokens[corpus.held_out], len(corpus.vocab)
    unigram = log_unigram(corpus.tokens[~corpus.held_out], vocab)
    rows = {"unigram, add-one": unigram, "uniform": np.zeros(vocab)}
    # the same row for every token: a view, of which no copy is made
    return {
        name: float(cross_entropy(np.broadcast_to(row, (labels.size, vocab)), labels)) for name, row in rows.items()
    }


def command(folder: Path) -> str:
    logits, labels, documents = (shlex.quote(str(folder / name)) for name in FILES[:3])
    return f"gpuxent perplexity {logits} --labels {labels} --documents {documents}"
