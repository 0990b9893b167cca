"""Two models on the same tokens: what changed, with errors of the difference itself.

The losses of two models on one text rise and fall together, so the error of their difference is far smaller than that
of either mean. Pairs of tokens come from both models' logits, or from the records of two runs, without any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any
from warnings import warn

import numpy as np

from gpuxent import _arguments as arguments
from gpuxent.evaluation.cluster import ClientWorkers, check_reachable
from gpuxent.evaluation.comparison.job import PairJob
from gpuxent.evaluation.comparison.kept import compare_job
from gpuxent.evaluation.comparison.pairs import Pairs
from gpuxent.evaluation.comparison.result import Comparison
from gpuxent.evaluation.evaluate import Data, as_source
from gpuxent.evaluation.job import check
from gpuxent.evaluation.runs.directory import Run
from gpuxent.evaluation.sources import PairSource
from gpuxent.evaluation.statistics.tokens import Tokens


def compare(
    base: Data,
    other: Data,
    labels: Data | None = None,
    *,
    documents: Data | None = None,
    mask: Data | None = None,
    shift: int = 0,
    min_context: int = 0,
    limit: int | None = None,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    other_temperature: float | None = None,
    vocab_align: str = "error",
    backend: str | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    allow_mixed: bool = False,
    memory: int | None = None,
    client: Any = None,
) -> Comparison:
    """Is the model `other` worse than `base`, by how much, and where?

    Args:
        base, other: with labels, logits (..., vocab) of both models for the same rows, each of any kind that `evaluate`
            takes, `linear_logits` included: read block by block, together. Without labels, the folders of two finished
            runs on the same tokens (`evaluate(..., run=)`): their records are enough for all but the divergences.
        vocab_align: "error" if vocabularies differ, or "crop": leave out the last classes of the larger one, and warn.
        other_temperature: that of `other`, if it is another than base's: of a model that was calibrated, say.
        labels: (...) integers. documents, mask, shift, min_context, limit, ignore_index, softcap, temperature, backend,
            run, resume, allow_mixed, memory, client: as `evaluate`; they are for logits, and for those of both models.

    Standard errors are of the paired difference: clustered by document where there are ids (as those of `evaluate`),
    and of independent tokens. Errors of exponentials are those of the exponents times the value. Sums are exact.

    The folder `run` keeps both models' numbers of every token: `gpuxent.evaluation.comparison.kept` has
    `read_pair_tokens` to read them, and `comparison_of_run` for the comparison with exact quantiles.

    Raises: OSError: a file or run that cannot be read. ValueError, TypeError: two vocabularies; an array of a wrong
        shape or dtype; a run that is not finished or keeps no tokens; runs whose rows, labels or documents differ.
        IndexError: a label outside the vocabulary.

    >>> import numpy as np
    >>> x, y = np.log([[0.5, 0.5], [0.8, 0.2]]), np.array([0, 0])
    >>> result = compare(x, 0.5 * x, y)
    >>> round(result.log_ratio.value, 4), round(result.kl.value, 4)
    (0.0912, 0.0218)
    """
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
    if labels is None:
        check_for_runs(**options, run=run, resume=resume, allow_mixed=allow_mixed, memory=memory, client=client)
        return compare_runs(_folder(base, "base"), _folder(other, "other"))
    job = open_pair_job(base, other, labels, **options)
    for warning in job.pair.left_out():
        warn(warning, UserWarning, stacklevel=2)
    if client is not None:
        check_reachable(job)
    return compare_job(
        job,
        run=run,
        resume=resume,
        allow_mixed=allow_mixed,
        memory=memory,
        workers=None if client is None else ClientWorkers(client),
    )


def open_pair_job(
    base: Data,
    other: Data,
    labels: Data,
    *,
    documents: Data | None = None,
    mask: Data | None = None,
    shift: int = 0,
    min_context: int = 0,
    limit: int | None = None,
    ignore_index: int | None = arguments.DEFAULT_IGNORE_INDEX,
    softcap: float | None = None,
    temperature: float = 1.0,
    other_temperature: float | None = None,
    vocab_align: str = "error",
    backend: str | None = None,
) -> PairJob:
    """Everything that can be checked without reading rows."""
    first, second = as_source(base, "base"), as_source(other, "other")
    change = arguments.transform(softcap, temperature)
    if other_temperature is None:
        other_temperature = change.temperature
    other_temperature = arguments.number(other_temperature, "other_temperature", 0, open_low=True)
    job = PairJob(
        PairSource(first, second, arguments.one_of(vocab_align, "vocab_align", ("error", "crop")) == "crop"),
        as_source(labels, "labels", getattr(first, "array", None)),
        None if documents is None else as_source(documents, "documents"),
        None if mask is None else as_source(mask, "mask"),
        shift=arguments.integer(shift, "shift", 0, 1),
        min_context=arguments.integer(min_context, "min_context", 0),
        limit=None if limit is None else arguments.positive(limit, "limit"),
        ignore_index=arguments.ignore_index(ignore_index),
        backend=backend,
        changes=(change, replace(change, temperature=other_temperature)),
    )
    for name, side in job.pair.sides.items():
        if side.dtype.newbyteorder("=") not in arguments.FLOAT_DTYPES:
            raise TypeError(f"{name} ({side.name}) must be float16, bfloat16, float32 or float64, got {side.dtype}")
    check(job)
    return job


# ---- runs ----


def _folder(value: Any, name: str) -> str | PathLike[str]:
    if not isinstance(value, (str, PathLike)):
        found = type(value).__qualname__
        raise ValueError(f"labels must be given to compare logits: {name} is no folder of a run, but of type {found}")
    return value


FOR_LOGITS = {
    "shift": 0,
    "min_context": 0,
    "ignore_index": arguments.DEFAULT_IGNORE_INDEX,
    "temperature": 1.0,
    "vocab_align": "error",
    "resume": False,
    "allow_mixed": False,
}


def check_for_runs(**options: Any) -> None:
    """ValueError if one is given that is for logits: runs were scored with their own."""
    for name, value in options.items():
        default = FOR_LOGITS.get(name)
        if value is not None if default is None else value != default:
            raise ValueError(f"{name} goes with labels, and logits to compare; got {name}={value!r} without labels")


def compare_runs(base: str | PathLike[str], other: str | PathLike[str]) -> Comparison:
    """From the tokens of two runs."""
    with Run.open(base, Tokens) as first, Run.open(other, Tokens) as second:
        for run in (first, second):
            _check(run)
        if first.rows != second.rows:
            raise ValueError(f"{second.path} must have the {first.rows:,} rows of {first.path}, got {second.rows:,}")
        pairs = Pairs()
        for mine, theirs in _paired(first, second):
            pairs = pairs.merge(Pairs.of(mine, theirs, exact=True))
        return replace(pairs.result(), rows=first.rows)


def _check(run: Run) -> None:
    if not run.keeps_tokens:
        raise ValueError(f"{run.path} has no record of its tokens")
    if not run.complete:
        raise ValueError(
            f"{run.path} must be finished, got {run.finished_rows:,} of {run.rows:,} rows; --resume goes on"
        )


def _paired(base: Run, other: Run) -> Iterator[tuple[Tokens, Tokens]]:
    """The same tokens of both, some at a time."""
    sides = [_Side(base), _Side(other)]
    while True:
        count = min(side.filled() for side in sides)
        if count == 0:
            break
        mine, theirs = (side.take(count) for side in sides)
        _check_same(mine, theirs, base.path, other.path)
        yield mine, theirs
    for side, against in (sides, sides[::-1]):
        if side.filled():
            row = int(side.take(1).row[0])
            raise ValueError(f"row {row:,} counts in {side.path}, but not in {against.path}")


class _Side:
    """A run's tokens, as many at a time as are wanted."""

    def __init__(self, run: Run) -> None:
        self.path, self._parts, self._left = run.path, run.tokens(), None

    def filled(self) -> int:
        """How many are at hand; 0 at the end."""
        while self._left is None or len(self._left) == 0:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._left = part
        return len(self._left)

    def take(self, count: int) -> Tokens:
        left = self._left
        assert left is not None
        self._left = left.take(slice(count, None))
        return left.take(slice(count))

    _left: Tokens | None


def _check_same(mine: Tokens, theirs: Tokens, base: Path, other: Path) -> None:
    different = np.flatnonzero(mine.row != theirs.row)
    if different.size:
        a, b = int(mine.row[different[0]]), int(theirs.row[different[0]])
        counts, lacks = (base, other) if a < b else (other, base)
        raise ValueError(f"row {min(a, b):,} counts in {counts}, but not in {lacks}")
    if (mine.document is None) != (theirs.document is None):
        has, lacks = (base, other) if theirs.document is None else (other, base)
        raise ValueError(f"{has} has document ids, but {lacks} has none")
    for name in ("label", "document"):
        a, b = getattr(mine, name), getattr(theirs, name)
        different = np.flatnonzero(a != b) if a is not None else np.zeros(0, np.int64)
        if different.size:
            i = int(different[0])
            raise ValueError(f"row {int(mine.row[i]):,} has {name} {a[i]} in {base}, but {b[i]} in {other}")
