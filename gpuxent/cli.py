"""The command line. Results go to stdout, all else to stderr; exit codes: 0 done, 2 usage, 3 bad input,
4 interrupted (a run directory can be gone on with)."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

from gpuxent import __version__

BAD_INPUT, INTERRUPTED = 3, 4
SOURCES = (
    "a .npy, .safetensors, .h5, .parquet or .kld file, a Zarr v3 folder, a folder or glob of files; FILE::NAME inside"
)

app = typer.Typer(
    help="Cross-entropy and perplexity over huge vocabularies.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

console = partial(Console, emoji=False)  # ":rock:" in the name of a file stays what it is


def panel(title: str) -> Any:
    """Options under a heading of their own in the help."""
    return partial(typer.Option, rich_help_panel=title)


reading, counting, scoring = panel("Input"), panel("Which tokens count"), panel("Statistics")
keeping, computing, writing = panel("Keeping a run"), panel("Where it is computed"), panel("Result")


class Format(StrEnum):
    table = "table"
    json = "json"


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


@app.command()
def perplexity(
    logits: Annotated[
        str | None, typer.Argument(metavar="[LOGITS]", help=f"Logits (..., vocab): {SOURCES}.", show_default=False)
    ] = None,
    labels: Annotated[str | None, reading(help="Labels (...), integers; a .kld file has its own.")] = None,
    hidden: Annotated[str | None, reading(help="Hidden states (..., features), instead of logits.")] = None,
    classifier: Annotated[str | None, reading(help="What makes logits of them (vocab, features).")] = None,
    bias: Annotated[str | None, reading(help="And is added to them (vocab).")] = None,
    documents: Annotated[str | None, reading(help="Document ids (...): standard errors by document.")] = None,
    mask: Annotated[str | None, counting(help="Which labels count (...): booleans, or integers other than 0.")] = None,
    shift: Annotated[int, counting(help="1: a row is scored by the label after it.")] = 0,
    min_context: Annotated[int, counting(help="Rows with less of their document before them do not count.")] = 0,
    limit: Annotated[int | None, counting(help="Only the first so many rows.")] = None,
    ignore_index: Annotated[int, counting(help="Label of tokens that do not count.")] = -100,
    temperature: Annotated[float, scoring(help="Divide the logits by this.")] = 1.0,
    softcap: Annotated[float | None, scoring(help="First softcap * tanh(logits / softcap).")] = None,
    topk: Annotated[str, scoring(help="The k of top-k accuracies.")] = "1,5",
    bins: Annotated[int, scoring(help="Bins of the calibration error.")] = 15,
    metadata: Annotated[
        Path | None, scoring(readable=False, help="About documents: CSV, JSON lines or Parquet, with `document`.")
    ] = None,
    bytes: Annotated[str | None, scoring(help="Bytes of the text: a number, or a column of --metadata.")] = None,
    words: Annotated[str | None, scoring(help="Words of the text: a number, or a column of --metadata.")] = None,
    group_by: Annotated[str | None, scoring(help="A column of --metadata: a line for each value.")] = None,
    run: Annotated[
        Path | None, keeping("-o", "--run", help="Keep what is finished, and every token, in this folder.")
    ] = None,
    resume: Annotated[bool, keeping("--resume", help="Go on with the run in the folder.")] = False,
    allow_mixed: Annotated[
        bool, keeping("--allow-mixed", help="Also on another backend or CPU type; the result says so.")
    ] = False,
    backend: Annotated[str | None, computing(help="numba, numpy or cupy; default: the best on the CPU.")] = None,
    memory: Annotated[str | None, computing(help="Logits to hold in each process, such as 2GB.")] = None,
    workers: Annotated[int | None, computing(help="Processes of this machine, instead of threads.", min=1)] = None,
    scheduler: Annotated[str | None, computing(help="Address of a Dask scheduler, whose workers score.")] = None,
    gpus: Annotated[str | None, computing(help="all: a process for each GPU of this machine.")] = None,
    format: Annotated[ResultFormat, writing(help="How to write the result.")] = ResultFormat.table,
    output: Annotated[Path | None, writing(help="Write the result to this file instead of stdout.")] = None,
) -> None:
    """Cross-entropy, perplexity, accuracy, entropy and calibration of stored logits, or of hidden states and a
    classifier, read block by block."""
    from gpuxent import _arguments
    from gpuxent.evaluation import report
    from gpuxent.evaluation.evaluate import linear_logits, open_job
    from gpuxent.evaluation.metadata import open_metadata

    if (logits is None) != (hidden is not None and classifier is not None) or (bias and not hidden):
        raise typer.BadParameter("give either logits, or --hidden and --classifier (and --bias)", param_hint="LOGITS")
    if labels is None and not (logits or "").endswith(".kld"):
        raise typer.BadParameter("must be given: only a .kld file has its own labels", param_hint="--labels")
    with bad_input_exits():
        _arguments.number(temperature, "--temperature", 0, open_low=True)
        check_writable(output, logits, hidden, classifier, bias, labels, documents, mask)
        labels = labels or f"{logits}::labels"
        about = open_metadata(metadata, bytes=bytes, words=words, group_by=group_by)
        options: dict[str, Any] = {
            "shift": shift,
            "min_context": min_context,
            "limit": limit,
            "topk": numbers(topk, "--topk"),
            "bins": bins,
            "ignore_index": ignore_index,
            "softcap": softcap,
            "temperature": temperature,
            "backend": "cupy" if gpus else backend,
        }
        rows = logits if hidden is None else linear_logits(hidden, classifier, bias)
        job = open_job(rows, labels, documents=documents, mask=mask, **options)
        for source in job.sources.values():
            for warning in source.warnings() if source else ():
                say(f"warning: {warning}")
        kept = {"run": run, "resume": resume, "allow_mixed": allow_mixed}
        result = score_with_progress(job, about, workers=(workers, scheduler, gpus), memory=memory, **kept)
        if result.scored == 0 and result.share == 1:
            none = f"{result.ignored:,} rows, of which none counts" if result.ignored else "no labels"
            raise ValueError(f"no token to score: {labels} has {none}")
        for warning in report.bad_rows(result):
            say(f"warning: {warning}")
        with written_to(output) as file:
            factors = {"hidden": hidden, "classifier": classifier, "bias": bias}
            inputs = {"logits": logits} if hidden is None else factors
            inputs |= {"labels": labels, "documents": documents, "mask": mask}
            what = {"gpuxent": __version__, "source": f"logits/{job.logits.dtype}", "shape": job.logits.shape}
            report.write(result, format, what | inputs | options, file, 80 if output else None)
        if result.share < 1:
            say("interrupted" + (f"; --run {run} --resume goes on" if run else ""))
            raise typer.Exit(INTERRUPTED)


def score_with_progress(
    job: Any, about: Any, *, workers: tuple[int | None, str | None, str | None], memory: str | None, **kept: Any
) -> Any:
    """`evaluate_job` on the workers asked for, with progress on stderr, and Ctrl-C."""
    from gpuxent.evaluation import cluster
    from gpuxent.evaluation.driver import Stop
    from gpuxent.evaluation.score import evaluate_job, interruptible

    size = None if memory is None else cluster.parse_memory(memory, "--memory")
    stop = Stop()
    with (
        cluster.workers(*workers) as team,
        interruptible(stop, say),
        row_progress(job.rows, console(stderr=True), loss_so_far) as watch,
    ):
        return evaluate_job(job, about, memory=size, workers=team, stop=stop, watch=watch, **kept)


class Kind(StrEnum):
    softmax = "softmax"
    sigmoid = "sigmoid"


class Given(StrEnum):
    logits = "logits"
    probs = "probs"


class Binning(StrEnum):
    width = "width"
    mass = "mass"


class TableFormat(StrEnum):
    table = "table"
    json = "json"
    markdown = "markdown"


@app.command()
def calibrate(
    logits: Annotated[
        str | None, typer.Argument(metavar="[LOGITS]", help=f"Logits (..., vocab): {SOURCES}.", show_default=False)
    ] = None,
    labels: Annotated[str | None, reading(help="Labels (...), integers; a .kld file has its own.")] = None,
    hidden: Annotated[str | None, reading(help="Hidden states (..., features), instead of logits.")] = None,
    classifier: Annotated[str | None, reading(help="What makes logits of them (vocab, features).")] = None,
    bias: Annotated[str | None, reading(help="And is added to them (vocab).")] = None,
    kind: Annotated[Kind, reading(help="sigmoid: logits (rows,) or (..., columns), labels of 0 and 1.")] = Kind.softmax,
    given: Annotated[Given, reading("--from", help="What LOGITS holds.")] = Given.logits,
    run: Annotated[Path | None, reading("--run", help="A finished run of perplexity, instead of LOGITS.")] = None,
    documents: Annotated[str | None, reading(help="Document ids (...): drawn, and held out, as wholes.")] = None,
    mask: Annotated[str | None, counting(help="Which labels count (...): booleans, or integers other than 0.")] = None,
    shift: Annotated[int, counting(help="1: a row is scored by the label after it.")] = 0,
    min_context: Annotated[int, counting(help="Rows with less of their document before them do not count.")] = 0,
    limit: Annotated[int | None, counting(help="Only the first so many rows.")] = None,
    ignore_index: Annotated[int, counting(help="Label of tokens that do not count.")] = -100,
    softcap: Annotated[float | None, scoring(help="First softcap * tanh(logits / softcap).")] = None,
    fit: Annotated[bool, scoring("--fit/--no-fit", help="Of logits: a temperature, checked on rows held out.")] = True,
    held_out: Annotated[float, scoring(help="Share of documents (or rows) held out for that.")] = 0.5,
    bins: Annotated[int, scoring(help="Number of bins.")] = 15,
    binning: Annotated[Binning, scoring(help="Bins of equal width or of equal mass.")] = Binning.width,
    level: Annotated[float, scoring(help="Of the intervals.")] = 0.95,
    resamples: Annotated[int, scoring(help="Draws that the intervals are of.")] = 1000,
    seed: Annotated[int, scoring(help="Of the draws, and of what is held out.")] = 0,
    backend: Annotated[str | None, computing(help="numba, numpy or cupy; default: the best on the CPU.")] = None,
    memory: Annotated[str | None, computing(help="Logits to hold in memory, such as 2GB.")] = None,
    format: Annotated[TableFormat, writing(help="How to write the result.")] = TableFormat.table,
    output: Annotated[Path | None, writing(help="Write the result to this file instead of stdout.")] = None,
) -> None:
    """How far the probabilities of stored logits can be trusted: ECE, Brier score and NLL with intervals, before and
    after a temperature that is fitted on other rows."""
    from gpuxent.evaluation import calibration, calibration_report
    from gpuxent.evaluation.cluster import parse_memory
    from gpuxent.evaluation.evaluate import linear_logits
    from gpuxent.evaluation.sources import open_source

    if [logits, hidden, run].count(None) != 2 or (hidden is None) != (classifier is None) or (bias and not hidden):
        raise typer.BadParameter(
            "give either logits, or --hidden and --classifier (and --bias), or --run", param_hint="LOGITS"
        )
    if run is None and labels is None and not (logits or "").endswith(".kld"):
        raise typer.BadParameter("must be given: only a .kld file has its own labels", param_hint="--labels")
    with bad_input_exits():
        check_writable(output, logits, hidden, classifier, bias, labels, documents, mask)
        shown: dict[str, Any] = {"bins": bins, "binning": str(binning)}
        shown |= {"level": level, "resamples": resamples, "seed": seed}
        what: dict[str, Any] = {"gpuxent": __version__, "logits": logits, "labels": labels, "run": run} | shown
        what |= {} if hidden is None else {"hidden": hidden, "classifier": classifier, "bias": bias}
        if run is not None:
            result: Any = calibration.reliability_of_run(run, **shown)
        else:
            rows: Any = open_source(str(logits)) if hidden is None else linear_logits(hidden, str(classifier), bias)
            for warning in rows.warnings():
                say(f"warning: {warning}")
            what |= {"source": f"{given}/{rows.dtype}", "shape": rows.shape, "kind": str(kind)}
            options: dict[str, Any] = {
                "kind": str(kind),
                "documents": documents,
                "mask": mask,
                "shift": shift,
                "min_context": min_context,
                "limit": limit,
                "ignore_index": ignore_index,
                "softcap": softcap,
                "backend": backend,
                "memory": None if memory is None else parse_memory(memory, "--memory"),
            }
            what |= options
            named = labels or f"{logits}::labels"
            with said_warnings():
                if fit and given is Given.logits:
                    what |= {"held_out": held_out}
                    result = calibration.check_temperature(rows, named, held_out=held_out, **options, **shown)
                else:
                    result = calibration.reliability(rows, named, given=str(given), **options, **shown)
        for warning in calibration_report.warnings(result):
            say(f"warning: {warning}")
        with written_to(output) as file:
            calibration_report.write(result, str(format), what, file, 80 if output else None)


@app.command()
def compare(
    base: Annotated[str, typer.Argument(metavar="BASE", help=f"A run's folder, or logits (..., vocab): {SOURCES}.")],
    other: Annotated[str, typer.Argument(metavar="OTHER", help="Another, on the same tokens.")],
    labels: Annotated[str | None, reading(help="Labels (...) of logits, integers; a .kld file has its own.")] = None,
    base_classifier: Annotated[str | None, reading(help="BASE is hidden states; this makes logits of them.")] = None,
    other_classifier: Annotated[str | None, reading(help="The same of OTHER.")] = None,
    base_bias: Annotated[str | None, reading(help="Is added to the logits of BASE (vocab).")] = None,
    other_bias: Annotated[str | None, reading(help="The same of OTHER.")] = None,
    documents: Annotated[str | None, reading(help="Document ids (...): standard errors by document.")] = None,
    mask: Annotated[str | None, counting(help="Which labels count (...): booleans, or integers other than 0.")] = None,
    shift: Annotated[int, counting(help="1: a row is scored by the label after it.")] = 0,
    min_context: Annotated[int, counting(help="Rows with less of their document before them do not count.")] = 0,
    limit: Annotated[int | None, counting(help="Only the first so many rows.")] = None,
    ignore_index: Annotated[int, counting(help="Label of tokens that do not count.")] = -100,
    vocab_align: Annotated[str, scoring(help="crop: leave out what the larger vocabulary has at its end.")] = "error",
    backend: Annotated[str | None, computing(help="numba, numpy or cupy; default: the best on the CPU.")] = None,
    memory: Annotated[str | None, computing(help="Logits to hold in each process, such as 2GB.")] = None,
    workers: Annotated[int | None, computing(help="Processes of this machine, instead of threads.", min=1)] = None,
    scheduler: Annotated[str | None, computing(help="Address of a Dask scheduler, whose workers score.")] = None,
    format: Annotated[ComparisonFormat, writing(help="How to write the comparison.")] = ComparisonFormat.table,
    output: Annotated[Path | None, writing(help="Write it to this file instead of stdout.")] = None,
) -> None:
    """Is OTHER worse than BASE, by how much, and where? From both models' logits, or from the tokens of two runs."""
    from gpuxent.evaluation import comparison_report
    from gpuxent.evaluation.compare import check_for_runs, compare_runs, open_pair_job

    if labels is None and base.endswith(".kld"):
        labels = f"{base}::labels"
    with bad_input_exits():
        factors = (base_classifier, base_bias, other_classifier, other_bias)
        check_writable(output, base, other, labels, documents, mask, *factors)
        options: dict[str, Any] = {
            "documents": documents,
            "mask": mask,
            "shift": shift,
            "min_context": min_context,
            "limit": limit,
            "ignore_index": ignore_index,
            "vocab_align": vocab_align,
            "backend": backend,
        }
        if labels is None:
            if Path(base).is_file():
                raise ValueError(f"--labels must be given: {base} is a file, and no run's folder")
            named = ("base_classifier", "base_bias", "other_classifier", "other_bias")
            more = {"memory": memory, "workers": workers, "scheduler": scheduler}
            check_for_runs(**options, **dict(zip(named, factors, strict=True)), **more)
            result = compare_runs(base, other)
        else:
            sides = with_classifier(base, *factors[:2]), with_classifier(other, *factors[2:])
            job = open_pair_job(*sides, labels, **options)
            for warning in job.logits.warnings():
                say(f"warning: {warning}")
            result = compare_with_progress(job, workers=(workers, scheduler, None), memory=memory)
        if result.scored == 0:
            raise ValueError("no token to compare: none counts")
        with written_to(output) as file:
            about = {"gpuxent": __version__, "base": base, "other": other, "labels": labels, "documents": documents}
            comparison_report.write(result, format, about, file, 80 if output else None)


def with_classifier(path: str, classifier: str | None, bias: str | None) -> Any:
    """Logits, or hidden states with what makes logits of them."""
    from gpuxent.evaluation.evaluate import linear_logits

    if classifier is None and bias is not None:
        raise ValueError(f"the bias {bias} goes with a classifier")
    return path if classifier is None else linear_logits(path, classifier, bias)


def compare_with_progress(job: Any, *, workers: tuple[int | None, str | None, str | None], memory: str | None) -> Any:
    """The comparison, on the workers asked for, with progress on stderr; Ctrl-C stops it, since nothing is kept."""
    from gpuxent.evaluation import cluster
    from gpuxent.evaluation.score import score, unchanged

    def note(pairs: Any) -> str:
        return f"difference {pairs.sums['log_ratio'].mean:+.4f} nats" if pairs.sums else "nothing compared yet"

    size = None if memory is None else cluster.parse_memory(memory, "--memory")
    with (
        unchanged(job),
        cluster.workers(*workers) as team,
        row_progress(job.rows, console(stderr=True), note) as watch,
    ):
        return score(job, memory=size, workers=team, watch=watch).result()


@app.command()
def demo(
    text: Annotated[
        Path | None, typer.Option(readable=False, help="A text file (UTF-8) instead of Python's language reference.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Keep the logits, labels and document ids in this folder.")
    ] = None,
) -> None:
    """Train a small language model on real text for under a minute, write its logits, and score the files."""
    from gpuxent.evaluation.demo import run_demo

    with bad_input_exits():
        run_demo(text, output, out=console(), progress=console(stderr=True))


@app.command()
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


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help=f"Logits, labels or document ids: {SOURCES}.")],
    labels: Annotated[str | None, typer.Option(help="Labels (...): do they fit these logits?")] = None,
    ignore_index: Annotated[int, typer.Option(help="Label of tokens that do not count.")] = -100,
    format: Annotated[Format, typer.Option(help="A table for people or JSON for programs.")] = Format.table,
) -> None:
    """What a file holds, what its values look like, and the time and memory that perplexity would take."""
    from gpuxent.evaluation import inspect

    with bad_input_exits():
        facts = inspect.facts(path, labels, ignore_index)
        with written_to(None) as file:
            if format is Format.json:
                file.write(json.dumps(facts, indent=2, allow_nan=False) + "\n")
            else:
                console(file=file).print(inspect.to_table(facts))
        if problem := facts.get("labels", {}).get("problem"):
            raise ValueError(problem)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help=f"What to copy: {SOURCES}.")],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="A .npy, .zarr, .safetensors, .h5 or .parquet file; FILE::NAME inside.")
    ],
    rows: Annotated[
        int | None,
        typer.Option(help="Rows per chunk (.zarr, .h5) or row group (.parquet); default: 16 MiB, .h5 in one piece."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT, with all that is in it.")] = False,
) -> None:
    """Copy an array into another format, block by block and bit for bit."""
    from gpuxent.evaluation.convert import convert
    from gpuxent.evaluation.sources import open_source

    with bad_input_exits():
        array = open_source(source)
        for warning in array.warnings():
            say(f"warning: {warning}")
        done = convert(array, out, console(stderr=True), rows=rows, overwrite=overwrite)
        with written_to(None) as file:
            file.write(f"{done}\n")


@contextmanager
def bad_input_exits() -> Iterator[None]:
    """What the library or the system says of bad input goes to stderr in one line, without a traceback."""
    try:
        yield
    except (BrokenPipeError, typer.Exit):  # `| head` has seen enough; an exit is a RuntimeError, too
        raise
    except (ValueError, TypeError, IndexError, ImportError, OSError, RuntimeError) as error:
        say(one_line(error))
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt:
        say("stopped")
        sys.stdout.flush()
        os._exit(INTERRUPTED)  # Python would wait for the threads whose blocks nobody wants any more


@contextmanager
def said_warnings() -> Iterator[None]:
    """What the library warns of goes to stderr in one line each."""
    with warnings.catch_warnings(record=True, action="always", category=UserWarning) as caught:
        yield
    for warning in caught:
        say(f"warning: {warning.message}")


def say(text: str) -> None:
    console(stderr=True, highlight=False, soft_wrap=True).print(f"gpuxent: {text}", markup=False)


def one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:  # without its "[Errno 2]"
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split("\n")).strip()


def numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} must be integers with commas between, got {text!r}") from None


def loss_so_far(summary: Any) -> str:
    totals = summary.totals
    return f"cross-entropy {totals.mean_loss:.4f}" if totals.scored else "nothing scored yet"


@contextmanager
def row_progress(rows: int, console: Console, note: Callable[[Any], str]) -> Iterator[Callable[[int, Any], None]]:
    """A watch for `score` that shows how many rows are done, and what is noted of the summary so far."""
    from gpuxent.evaluation.progress import Progress

    with Progress(rows, "rows", console) as progress:

        def watch(done: int, summary: Any) -> None:
            progress.advance(done, note(summary))

        yield watch


def check_writable(output: Path | None, *inputs: str | Path | None) -> None:
    """Find out before the work, not after it; and never write over what is read."""
    if output is None:
        return
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"--output must be a file in an existing folder, got {output}")
    if not os.access(output if output.exists() else output.parent, os.W_OK):
        raise ValueError(f"--output must be a file that may be written, got {output}")
    paths = [Path(path) for path in inputs if path is not None]
    if output.exists() and any(path.exists() and output.samefile(path) for path in paths):
        raise ValueError(f"--output must not be one of the inputs, got {output}")


@contextmanager
def written_to(output: Path | None) -> Iterator[TextIO]:
    """The file, or stdout; an error, such as a full disk, says which."""
    try:
        if output is None:
            yield sys.stdout
            sys.stdout.flush()
        else:
            with output.open("w", encoding="utf-8") as file:
                yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        if output is None:  # what is still buffered would fail again when Python exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(f"{output or 'stdout'} cannot be written: {error.strerror}") from error


def show_version(value: bool) -> None:
    if value:
        typer.echo(f"gpuxent {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=show_version, is_eager=True),
    ] = False,
) -> None:
    """Cross-entropy and perplexity over huge vocabularies."""


def main() -> None:
    app()
