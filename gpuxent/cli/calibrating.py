"""`gpuxent calibrate`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gpuxent import __version__
from gpuxent.cli._console import bad_input_exits, check_writable, said_warnings, say, written_to
from gpuxent.cli._options import SOURCES, TableFormat, computing, counting, reading, scoring, writing


class Kind(StrEnum):
    softmax = "softmax"
    sigmoid = "sigmoid"


class Given(StrEnum):
    logits = "logits"
    probs = "probs"


class Binning(StrEnum):
    width = "width"
    mass = "mass"


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
    from gpuxent.evaluation.calibration import calibrate as calibration
    from gpuxent.evaluation.calibration import report as calibration_report
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
