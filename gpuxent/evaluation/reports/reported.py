"""What a report shows of runs, read from their folders: the ledger and the record of tokens, never logits."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gpuxent.evaluation.calibration.forecasts import Forecasts
from gpuxent.evaluation.calibration.reliability import Reliability, Resampling, measure, result_of
from gpuxent.evaluation.comparison.kept import comparison_of_run
from gpuxent.evaluation.comparison.result import Comparison
from gpuxent.evaluation.reports.running import Running, RunningMean
from gpuxent.evaluation.runs.directory import Run
from gpuxent.evaluation.statistics.histogram import LossHistogram
from gpuxent.evaluation.statistics.result import DocumentTable, Evaluation, GroupStatistics
from gpuxent.evaluation.statistics.summary import Summary
from gpuxent.evaluation.statistics.tokens import PairTokens

MOST_FORECASTS = 50_000_000  # tokens whose calibration is resampled: about 40 bytes of memory each
FROM_TABLES = ("bits_per_byte", "bits_per_byte_stderr", "bits_per_word", "bits_per_word_stderr", "word_perplexity")


@dataclass(frozen=True, eq=False)
class ReportedRun:
    """A run of `evaluate`, finished or not.

    `about` is the run's fingerprint (gpuxent, sources, options) with `computed_by`. `reliability` is None where
    `why_no_reliability` says why; the bins of `result` are there nevertheless. `running` and `document_stderr` (of the
    documents' means, tokens taken as independent, in the order of `documents`) are None if no tokens were kept, the
    latter also without documents.
    """

    name: str  # short, and of no other run in the report
    path: Path
    about: dict[str, Any]
    result: Evaluation
    losses: LossHistogram
    reliability: Reliability | None
    why_no_reliability: str
    running: Running | None
    document_stderr: np.ndarray | None

    @property
    def complete(self) -> bool:
        """Are all rows in these numbers?"""
        return self.result.share == 1

    @property
    def documents(self) -> DocumentTable | None:
        return self.result.by_document


@dataclass(frozen=True, eq=False)
class ReportedComparison:
    """Two models on the same tokens, by their names."""

    name: str
    path: Path
    about: dict[str, Any]
    base: str  # what was read of each
    other: str
    result: Comparison


@dataclass(frozen=True, eq=False)
class Reported:
    """All that a report is of."""

    runs: list[ReportedRun]
    comparisons: list[ReportedComparison]


def open_reported(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Reported:
    """Everything that a report shows of these runs.

    Streams over the records of tokens; of each run about 40 bytes a token are in memory while its calibration is
    resampled, and otherwise nothing that grows with the tokens.

    Raises: OSError, ValueError: a folder that holds no run, one that is going on or damaged, or no scored token; no
        folder at all, or one twice.
    """
    listed = [Path(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    if not listed:
        raise ValueError("runs must be one folder at least, got none")
    reported = Reported([], [])
    for path, name in zip(listed, short_names(listed), strict=True):
        with Run.open(path) as run:
            if run.kind == PairTokens.kind:
                reported.comparisons.append(_comparison(run, name))
            else:
                reported.runs.append(_run(run, name))
    return reported


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for number, path in enumerate(paths):
        if parts[number] in parts[:number]:
            raise ValueError(f"runs must be different folders, got {path} twice")
    names = []
    for own in parts:
        depth = 1
        while sum(other[-depth:] == own[-depth:] for other in parts) > 1:
            depth += 1
        names.append("/".join(own[-depth:]))
    return names


def _run(run: Run, name: str) -> ReportedRun:
    summary = _summary(run)
    if not summary.totals.scored:
        raise _nothing(run)
    result = _with_tables(summary.result(rows=run.rows, mixed=run.mixed), run)
    reliability, why, running, stderr = None, "", None, None
    if run.keeps_tokens:
        reliability, why, running, stderr = _of_tokens(run, summary, result)
    else:
        why = "the run kept no tokens"
    return ReportedRun(name, run.path, _about(run), result, summary.losses, reliability, why, running, stderr)


def _comparison(run: Run, name: str) -> ReportedComparison:
    result = comparison_of_run(run)
    if not result.scored:
        raise _nothing(run)
    sources = run.fingerprint["sources"]
    base, other = (
        ", ".join(Path(source["name"]).name for key, source in sources.items() if source and key.split()[0] == side)
        for side in ("base", "other")
    )
    return ReportedComparison(name, run.path, _about(run), base, other, result)


def _nothing(run: Run) -> ValueError:
    some = f"{run.finished_rows:,} of {run.rows:,} rows are done"
    return ValueError(f"{run.path} holds no scored token to report: {some}")


def _about(run: Run) -> dict[str, Any]:
    return run.fingerprint | {"computed_by": list(run.computed_by)}


def _summary(run: Run) -> Summary:
    """ValueError if the folder is that of another kind of run, or of none that this version knows."""
    try:
        options, sources = run.fingerprint["options"], run.fingerprint["sources"]
        identity = Summary.identity(
            tuple(options["topk"]), options["bins"], documents=sources.get("documents") is not None
        )
        return run.summary(identity)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{run.path} holds no run of perplexity that can be read: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"{run.path} holds no run of perplexity that can be read: {error}") from error


def _with_tables(result: Evaluation, run: Run) -> Evaluation:
    """With what tables about the documents once added: the ledger does not know it, the written result does, if it is
    of the same tokens."""
    try:
        written = run.result or {}
        if written.get("scored") != result.scored:
            return result
        known = {name: written.get(name) for name in FROM_TABLES}
        groups = tuple(GroupStatistics(**_nan_for_none(group)) for group in written.get("groups", ()))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{run.path / 'result.json'} is damaged: {error}") from error
    return replace(result, groups=groups, **known)  # type: ignore[arg-type]


def _nan_for_none(group: dict[str, Any]) -> dict[str, Any]:
    return {k: float("nan") if v is None and not k.startswith("bits") else v for k, v in group.items()}


def _of_tokens(
    run: Run, summary: Summary, result: Evaluation
) -> tuple[Reliability | None, str, Running, np.ndarray | None]:
    """What one pass over the record of tokens leaves behind."""
    why = ""
    if result.nan_rows:
        why = f"{result.nan_rows:,} rows have a loss of NaN, first row {result.first_nan_row:,}"
    elif result.scored > MOST_FORECASTS:
        why = f"{result.scored:,} tokens are too many to resample"
    ids = None if result.by_document is None else result.by_document.document
    running = RunningMean(summary.totals, ids)
    forecasts = []
    for tokens in run.tokens():
        running.add(tokens)
        if not why:
            forecasts.append(Forecasts.of_tokens(tokens))
    if running.seen != result.scored:
        raise ValueError(
            f"{run.path} is damaged: its record has {running.seen:,} tokens, and {result.scored:,} were scored"
        )
    reliability = None
    if not why:
        joined = replace(Forecasts.concatenated(forecasts), ignored=result.ignored)
        how = Resampling()
        reliability = result_of(joined, measure(joined, len(result.bins), "width", how), "width", how)
    return reliability, why, running.result(), running.document_stderr()
