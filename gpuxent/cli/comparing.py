"""`gpuxent compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gpuxent import __version__
from gpuxent.cli._console import INTERRUPTED, bad_input_exits, check_writable, say, written_to
from gpuxent.cli._options import SOURCES, ComparisonFormat, computing, counting, keeping, reading, scoring, writing
from gpuxent.cli.scoring import with_progress


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
    temperature: Annotated[float, scoring(help="Divide the logits by this.")] = 1.0,
    other_temperature: Annotated[float | None, scoring(help="And those of OTHER by this, if it is another.")] = None,
    softcap: Annotated[float | None, scoring(help="First softcap * tanh(logits / softcap).")] = None,
    vocab_align: Annotated[str, scoring(help="crop: leave out what the larger vocabulary has at its end.")] = "error",
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
    format: Annotated[ComparisonFormat, writing(help="How to write the comparison.")] = ComparisonFormat.table,
    output: Annotated[Path | None, writing(help="Write it to this file instead of stdout.")] = None,
) -> None:
    """Is OTHER worse than BASE, by how much, and where? From both models' logits, or from the tokens of two runs."""
    from gpuxent.evaluation.comparison import report as comparison_report
    from gpuxent.evaluation.comparison.compare import check_for_runs, compare_runs, open_pair_job
    from gpuxent.evaluation.comparison.kept import compare_job

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
            "softcap": softcap,
            "temperature": temperature,
            "other_temperature": other_temperature,
            "vocab_align": vocab_align,
            "backend": backend,
        }
        kept = {"run": run, "resume": resume, "allow_mixed": allow_mixed}
        if labels is None:
            if Path(base).is_file():
                raise ValueError(f"--labels must be given: {base} is a file, and no run's folder")
            named = ("base_classifier", "base_bias", "other_classifier", "other_bias")
            more = {"memory": memory, "workers": workers, "scheduler": scheduler}
            check_for_runs(**options, **dict(zip(named, factors, strict=True)), **kept, **more)
            result = compare_runs(base, other)
        else:
            sides = with_classifier(base, *factors[:2]), with_classifier(other, *factors[2:])
            job = open_pair_job(*sides, labels, **options)
            for warning in job.logits.warnings():
                say(f"warning: {warning}")
            team = (workers, scheduler, None)
            result = with_progress(compare_job, job, difference_so_far, workers=team, memory=memory, **kept)
        if result.scored == 0 and result.share == 1:
            raise ValueError("no token to compare: none counts")
        with written_to(output) as file:
            about = {"gpuxent": __version__, "base": base, "other": other, "labels": labels} | options
            comparison_report.write(result, format, about, file, 80 if output else None)
        if result.share < 1:
            say("interrupted" + (f"; --run {run} --resume goes on" if run else ""))
            raise typer.Exit(INTERRUPTED)


def with_classifier(path: str, classifier: str | None, bias: str | None) -> Any:
    """Logits, or hidden states with what makes logits of them."""
    from gpuxent.evaluation.evaluate import linear_logits

    if classifier is None and bias is not None:
        raise ValueError(f"the bias {bias} goes with a classifier")
    return path if classifier is None else linear_logits(path, classifier, bias)


def difference_so_far(pairs: Any) -> str:
    return f"difference {pairs.sums['log_ratio'].mean:+.4f} nats" if pairs.sums else "nothing compared yet"
