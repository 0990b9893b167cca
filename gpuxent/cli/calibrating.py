"""`gpuxent calibrate`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gpuxent import __version__
from gpuxent.cli._console import (
    bad_input_exits,
    check_writable,
    console,
    pass_progress,
    said_warnings,
    say,
    written_to,
)
from gpuxent.cli._options import SOURCES, TableFormat, computing, counting, numbers, reading, scoring, writing

FOR_RUNS = ("run", "bins", "binning", "level", "resamples", "seed", "format", "output")  # options of a run
FOR_FITS = ("method", "C", "held_out")


class Kind(StrEnum):
    softmax = "softmax"
    sigmoid = "sigmoid"


class Given(StrEnum):
    logits = "logits"
    probs = "probs"


class Method(StrEnum):
    temperature = "temperature"
    vector = "vector"
    matrix = "matrix"


class Binning(StrEnum):
    width = "width"
    mass = "mass"


def calibrate(
    context: typer.Context,
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
    fit: Annotated[bool, scoring("--fit/--no-fit", help="Of logits: fit, and check on rows held out.")] = True,
    method: Annotated[
        Method, scoring(help="What is fitted: one number, a scale and a bias per class, or a matrix.")
    ] = Method.temperature,
    C: Annotated[float, scoring("--C", help="Inverse strength of the penalty on scales and biases.")] = 1.0,
    held_out: Annotated[float, scoring(help="Share of documents (or rows) held out from the fit.")] = 0.5,
    classes: Annotated[str | None, scoring(help="Also of single classes, such as 3,17.", show_default=False)] = None,
    bins: Annotated[int, scoring(help="Number of bins.")] = 15,
    binning: Annotated[Binning, scoring(help="Bins of equal width or of equal mass.")] = Binning.width,
    level: Annotated[float, scoring(help="Of the intervals.")] = 0.95,
    resamples: Annotated[int, scoring(help="Draws that the intervals are of.")] = 1000,
    seed: Annotated[int, scoring(help="Of the draws, and of what is held out.")] = 0,
    backend: Annotated[str | None, computing(help="numba, numpy or cupy; default: the best on the CPU.")] = None,
    memory: Annotated[str | None, computing(help="Logits to hold in each process, such as 2GB.")] = None,
    workers: Annotated[int | None, computing(help="Processes of this machine, instead of threads.", min=1)] = None,
    scheduler: Annotated[str | None, computing(help="Address of a Dask scheduler, whose workers read.")] = None,
    format: Annotated[TableFormat, writing(help="How to write the result.")] = TableFormat.table,
    output: Annotated[Path | None, writing(help="Write the result to this file instead of stdout.")] = None,
) -> None:
    """How far the probabilities of stored logits can be trusted: ECE, Brier score and NLL with intervals, before and
    after a temperature, or a vector or matrix scaling, that is fitted on other rows."""
    from gpuxent.evaluation.calibration import report
    from gpuxent.evaluation.calibration.calibrate import reliability_of_run
    from gpuxent.evaluation.calibration.measuring import Measuring

    if [logits, hidden, run].count(None) != 2 or (hidden is None) != (classifier is None) or (bias and not hidden):
        raise typer.BadParameter(
            "give either logits, or --hidden and --classifier (and --bias), or --run", param_hint="LOGITS"
        )
    fit = fit and given is Given.logits
    check_options(context, run is not None, fit, method)
    if kind is Kind.sigmoid and method is not Method.temperature:
        raise typer.BadParameter("vector and matrix go with --kind softmax", param_hint="--method")
    if run is None and labels is None and not (logits or "").endswith(".kld"):
        raise typer.BadParameter("must be given: only a .kld file has its own labels", param_hint="--labels")
    with bad_input_exits():
        check_writable(output, logits, hidden, classifier, bias, labels, documents, mask)
        shown: dict[str, Any] = {"bins": bins, "binning": str(binning)}
        shown |= {"level": level, "resamples": resamples, "seed": seed}
        what: dict[str, Any] = {"gpuxent": __version__, "logits": logits, "labels": labels, "run": run} | shown
        what |= {} if hidden is None else {"hidden": hidden, "classifier": classifier, "bias": bias}
        of_classes: Any = None
        if run is not None:
            result: Any = reliability_of_run(run, **shown)
        else:
            measuring = Measuring.checked(kind=str(kind), given=str(given), **shown)
            options: dict[str, Any] = {
                "documents": documents,
                "mask": mask,
                "shift": shift,
                "min_context": min_context,
                "limit": limit,
                "ignore_index": ignore_index,
                "softcap": softcap,
                "backend": backend,
            }
            job = opened(measuring, (logits, hidden, classifier, bias), labels, options)
            what |= {"source": f"{given}/{job.logits.dtype}", "shape": job.logits.shape, "kind": str(kind)} | options
            what |= {"method": str(method), "C": C, "held_out": held_out} if fit else {}
            chosen = None if classes is None else numbers(classes, "--classes")
            fitting = (str(method), C, held_out) if fit else None
            result, of_classes = measured(job, measuring, fitting, chosen, (workers, scheduler, None), memory)
        for warning in report.warnings(result):
            say(f"warning: {warning}")
        with written_to(output) as file:
            report.write(result, str(format), what, file, 80 if output else None, of_classes)


def check_options(context: typer.Context, of_run: bool, fit: bool, method: Method) -> None:
    """Those that would be ignored are refused."""
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if source is None or source.name != "COMMANDLINE":
            continue
        if of_run and option.name not in FOR_RUNS:
            raise typer.BadParameter("goes with logits, not with --run", param_hint=option.opts[0])
        if not fit and option.name in FOR_FITS:
            raise typer.BadParameter("goes with a fit, of logits and without --no-fit", param_hint=option.opts[0])
        if option.name == "C" and method is Method.temperature:
            raise typer.BadParameter("goes with --method vector or matrix", param_hint="--C")


def opened(
    measuring: Any,
    rows: tuple[str | None, str | None, str | None, str | None],
    labels: str | None,
    options: dict[str, Any],
) -> Any:
    """The job of stored logits, or of hidden states, a classifier and a bias; what is odd about them is said."""
    from gpuxent.evaluation.calibration.rows import open_rows
    from gpuxent.evaluation.evaluate import linear_logits
    from gpuxent.evaluation.sources import open_source

    logits, hidden, classifier, bias = rows
    source: Any = open_source(str(logits)) if hidden is None else linear_logits(hidden, str(classifier), bias)
    for warning in source.warnings():
        say(f"warning: {warning}")
    with said_warnings():
        return open_rows(measuring.kind, measuring.probs, source, labels or f"{logits}::labels", **options)


def measured(
    job: Any,
    measuring: Any,
    fitting: tuple[str, float, float] | None,
    classes: tuple[int, ...] | None,
    workers: tuple[int | None, str | None, str | None],
    memory: str | None,
) -> tuple[Any, Any]:
    """(the check of a method, C and share held out, None), or (reliability, that of classes), on the workers asked for,
    with progress on stderr. Ctrl-C stops it, since nothing is kept."""
    from gpuxent.evaluation import cluster
    from gpuxent.evaluation.calibration.checking import Fitting, check, measure
    from gpuxent.evaluation.calibration.passes import Passes

    size = None if memory is None else cluster.parse_memory(memory, "--memory")
    with cluster.workers(*workers) as team, pass_progress(job.rows, console(stderr=True)) as watch:
        passes = Passes(size, team, watch)
        if fitting is None:
            return measure(job, measuring, passes, classes)
        method, C, held_out = fitting
        fit = Fitting() if method == "temperature" else Fitting.scaling(method, C)
        return check(job, fit, measuring, passes, held_out=held_out, classes=classes), None
