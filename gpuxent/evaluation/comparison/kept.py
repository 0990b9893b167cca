"""Comparisons of logits, in the folder of a run if one is named, and what is read of such a folder later."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial, reduce
from os import PathLike
from typing import Any

from gpuxent.evaluation.comparison.job import PairJob
from gpuxent.evaluation.comparison.pairs import Pairs
from gpuxent.evaluation.comparison.result import Comparison
from gpuxent.evaluation.runs.directory import Run, read_tokens
from gpuxent.evaluation.score import scored
from gpuxent.evaluation.statistics.tokens import PairTokens


def compare_job(job: PairJob, **how: Any) -> Comparison:
    """The comparison of a job; `how` it is scored, and what is kept, as in `score.scored`."""
    with scored(job, **how) as done:
        result = _result(done.summary, done.rows, job.rows, done.mixed)
        done.keep(result.to_dict())
    return result


def comparison_of_run(run: Run | str | PathLike[str]) -> Comparison:
    """What a run of `compare` has found, made from its tokens, whose quantiles are exact: `quantile_error` is 0.

    In memory are 16 bytes of every token, and sums by document. Of a run that is not finished it is the result so far,
    and `share` says how far.

    Raises: OSError, ValueError: a folder that holds no run, one of `perplexity`, or one that is going on or damaged.
    """
    if not isinstance(run, Run):
        with Run.open(run, PairTokens) as opened:
            return comparison_of_run(opened)
    parts = map(partial(Pairs.of_tokens, exact=True), read_pair_tokens(run))
    return _result(reduce(Pairs.merge, parts, Pairs()), run.finished_rows, run.rows, run.mixed)


def read_pair_tokens(run: Run | str | PathLike[str]) -> Iterator[PairTokens]:
    """All tokens of a run of `compare` in the order of their rows, some 100,000 at a time, as arrays.

    Raises: as `comparison_of_run`.
    """
    return read_tokens(run, PairTokens)


def _result(pairs: Pairs, done: int, rows: int, mixed: tuple[str, ...]) -> Comparison:
    return replace(pairs.result(), rows=rows, share=done / rows if rows else 1.0, mixed=mixed)
