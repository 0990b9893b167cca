"""`gpuxent perplexity`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from gpuxent import __version__
from gpuxent.cli._console import INTERRUPTED, bad_input_exits, check_writable, console, row_progress, say, written_to
from gpuxent.cli._options import SOURCES, ResultFormat, computing, counting, keeping, numbers, reading, scoring, writing


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
    from gpuxent.evaluation.evaluate import linear_logits, open_job
    from gpuxent.evaluation.reports import tables
    from gpuxent.evaluation.score import evaluate_job
    from gpuxent.evaluation.statistics.metadata import open_metadata

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
        team = (workers, scheduler, gpus)
        evaluate = partial(evaluate_job, about=about)
        result = with_progress(evaluate, job, loss_so_far, workers=team, memory=memory, **kept)
        if result.scored == 0 and result.share == 1:
            none = f"{result.ignored:,} rows, of which none counts" if result.ignored else "no labels"
            raise ValueError(f"no token to score: {labels} has {none}")
        for warning in tables.bad_rows(result):
            say(f"warning: {warning}")
        with written_to(output) as file:
            factors = {"hidden": hidden, "classifier": classifier, "bias": bias}
            inputs = {"logits": logits} if hidden is None else factors
            inputs |= {"labels": labels, "documents": documents, "mask": mask}
            what = {"gpuxent": __version__, "source": f"logits/{job.logits.dtype}", "shape": job.logits.shape}
            tables.write(result, format, what | inputs | options, file, 80 if output else None)
        if result.share < 1:
            say("interrupted" + (f"; --run {run} --resume goes on" if run else ""))
            raise typer.Exit(INTERRUPTED)


def with_progress(
    evaluate: Callable[..., Any],
    job: Any,
    note: Callable[[Any], str],
    *,
    workers: tuple[int | None, str | None, str | None],
    memory: str | None,
    **kept: Any,
) -> Any:
    """The job evaluated on the workers asked for, with progress on stderr, and Ctrl-C."""
    from gpuxent.evaluation import cluster
    from gpuxent.evaluation.driver import Stop
    from gpuxent.evaluation.score import interruptible

    size = None if memory is None else cluster.parse_memory(memory, "--memory")
    stop = Stop()
    with (
        cluster.workers(*workers) as team,
        interruptible(stop, say),
        row_progress(job.rows, console(stderr=True), note) as watch,
    ):
        return evaluate(job, memory=size, workers=team, stop=stop, watch=watch, **kept)


def loss_so_far(summary: Any) -> str:
    totals = summary.totals
    return f"cross-entropy {totals.mean_loss:.4f}" if totals.scored else "nothing scored yet"
