"""`perplexity` and `evaluate`: one number, or all of them, over arrays, files and arrays of Dask."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpuxent import _arguments as arguments
from gpuxent._dlpack import returns_own_kind
from gpuxent._records import Array
from gpuxent.backends import is_dask
from gpuxent.evaluation.cluster import ClientWorkers, check_reachable, default_client
from gpuxent.evaluation.job import Job, check
from gpuxent.evaluation.score import evaluate_job
from gpuxent.evaluation.sources import ArraySource, DaskSource, LinearSource, Source, open_source
from gpuxent.evaluation.statistics.metadata import open_metadata
from gpuxent.evaluation.statistics.result import Evaluation
from gpuxent.losses import cross_entropy

Data = Array | str | Path | Source


@returns_own_kind
def perplexity(
    logits: Data,
    labels: Data,
    *,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    check_labels: bool = True,
    backend: str | None = None,
) -> float:
    """exp of the mean cross-entropy of the rows that count, as a float. A Dask array is computed, a GPU waited for.

    Logits may also be a path or `linear_logits`, which `evaluate` reads block by block. Arguments and errors as
    `cross_entropy`; the mean is the correctly rounded one. inf if the exponential overflows (the cross-entropy itself
    does not), NaN if no row counts.

    >>> import numpy as np
    >>> round(perplexity(np.zeros((3, 8)), np.array([1, 5, -100])), 4)
    8.0
    """
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "softcap": softcap,
        "temperature": temperature,
        "check_labels": check_labels,
        "backend": backend,
    }
    if is_source(logits):
        return evaluate(logits, labels, **options).perplexity
    mean = cross_entropy(logits, labels, **options)
    with np.errstate(over="ignore"):
        return float(np.exp(float(mean.compute() if is_dask(mean) else mean)))


@returns_own_kind
def evaluate(
    logits: Data,
    labels: Data,
    *,
    documents: Data | None = None,
    mask: Data | None = None,
    shift: int = 0,
    min_context: int = 0,
    limit: int | None = None,
    topk: tuple[int, ...] = (1, 5),
    bins: int = 15,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    check_labels: bool = True,
    backend: str | None = None,
    metadata: str | Path | Mapping[str, Any] | None = None,
    bytes: int | str | None = None,
    words: int | str | None = None,
    group_by: str | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    allow_mixed: bool = False,
    memory: int | None = None,
    client: Any = None,
) -> Evaluation:
    """Cross-entropy, perplexity, accuracy, entropy and calibration of a data set, in one read of the logits.

    Every sum is exact, so the result is the same bit for bit however the rows are cut into blocks, on however many
    threads, processes or machines of one kind, and after however many interruptions.

    Args:
        logits: (..., vocab): `linear_logits` of hidden states and a classifier, or a NumPy, CuPy or Dask array, a
            tensor on a GPU, or a path that
            `gpuxent.evaluation.sources.open_source` knows (`.npy`, Zarr v3, safetensors, HDF5, Parquet, `.kld`, a
            folder or glob of such files; `path::name` inside a file), read block by block. What is measured of each row
            of a CuPy array comes to the CPU, block by block: that waits for the GPU.
        labels: (...) integers, of any of these kinds.
        documents: (...) integers: the document of each row. Standard errors are then clustered by document.
        mask: (...) booleans or integers; labels at 0 do not count.
        shift: 1 scores a row by the label after it, in its own document and sequence (the last leading axis); for
            labels that are the tokens that the model read.
        min_context: rows with fewer rows of their document and sequence before them do not count.
        limit: only the first so many rows.
        topk: the k of the top-k accuracies; 1 is always among them.
        bins: number of equal-width bins of p_max for the expected calibration error.
        ignore_index, softcap, temperature, check_labels, backend: as `cross_entropy`. Rows that do not count are not
            checked.
        metadata: a table with a column `document` and others: the path of a CSV, JSON lines or Parquet file, or a dict
            of columns.
        bytes, words: of the text, in total, or the column of `metadata` that counts them: adds bits per byte, and per
            word.
        group_by: the column of `metadata` by whose values documents are grouped.
        run: a folder that keeps what is finished, and a record of every token, in Parquet (`gpuxent[parquet]`).
        resume: go on with what a run left in its folder; the inputs must be the same.
        allow_mixed: let blocks of other backends or CPU types join a resumed run; the result names them.
        memory: about how many bytes of logits to hold (in each process).
        client: a `distributed.Client` whose workers read the files and score them; for an array of Dask the default is
            the one in use.

    Returns: `Evaluation`. Rows with a NaN or infinite loss are counted there, with the number of the first.

    Raises: IndexError, ValueError, TypeError: as `cross_entropy`; OSError: a file that cannot be read or written;
        RuntimeError: rows whose workers die.

    >>> import numpy as np
    >>> result = evaluate(np.log([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3]]), np.array([0, 2]), topk=(1, 2))
    >>> round(result.perplexity, 4), result.accuracy, result.topk_accuracy[2], result.scored
    (2.1822, 0.5, 1.0, 2)
    """
    about = open_metadata(metadata, bytes=bytes, words=words, group_by=group_by)
    job = open_job(
        logits,
        labels,
        documents=documents,
        mask=mask,
        shift=shift,
        min_context=min_context,
        limit=limit,
        topk=topk,
        bins=bins,
        ignore_index=ignore_index,
        softcap=softcap,
        temperature=temperature,
        check_labels=check_labels,
        backend=backend,
    )
    client = client or (default_client() if is_dask(logits) else None)
    if client is not None:
        check_reachable(job)
    return evaluate_job(
        job,
        about,
        run=run,
        resume=resume,
        allow_mixed=allow_mixed,
        memory=memory,
        workers=None if client is None else ClientWorkers(client),
    )


def open_job(
    logits: Data,
    labels: Data,
    *,
    documents: Data | None = None,
    mask: Data | None = None,
    shift: int = 0,
    min_context: int = 0,
    limit: int | None = None,
    topk: tuple[int, ...] = (1, 5),
    bins: int = 15,
    ignore_index: int | None = arguments.DEFAULT_IGNORE_INDEX,
    softcap: float | None = None,
    temperature: float = 1.0,
    check_labels: bool = True,
    backend: str | None = None,
) -> Job:
    """Everything that `evaluate` can check without reading rows."""
    source = as_source(logits, "logits")
    job = Job(
        source,
        as_source(labels, "labels", getattr(source, "array", None)),
        None if documents is None else as_source(documents, "documents"),
        None if mask is None else as_source(mask, "mask"),
        shift=arguments.integer(shift, "shift", 0, 1),
        min_context=arguments.integer(min_context, "min_context", 0),
        limit=None if limit is None else arguments.positive(limit, "limit"),
        ignore_index=arguments.ignore_index(ignore_index),
        check_labels=check_labels,
        transform=vars(arguments.transform(softcap, temperature)),
        backend=backend,
        topk=tuple(sorted({1, *arguments.topk(topk)})),
        bins=arguments.positive(bins, "bins"),
    )
    check(job)
    return job


def linear_logits(hidden: Data, classifier: Data, bias: Data | None = None) -> LinearSource:
    """Logits as hidden @ classifier.T + bias, for `evaluate` and `perplexity`: made a tile of rows at a time.

    Args:
        hidden: (..., features), of any kind that `evaluate` takes for logits.
        classifier: (vocab, features), an array or a path, of hidden's dtype; every process loads it once.
        bias: (vocab,), likewise.

    The numbers are those of stored logits up to the rounding of the products, and the same bit for bit under any number
    of workers.

    >>> import numpy as np
    >>> hidden, classifier = np.array([[1.0, 2.0], [0.5, 0.0]]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> round(perplexity(linear_logits(hidden, classifier), np.array([2, 0])), 4)
    1.9794
    """
    sources = (as_source(hidden, "hidden"), as_source(classifier, "classifier"))
    return LinearSource(*sources, None if bias is None else as_source(bias, "bias"))


def as_source(value: Any, name: str, beside: Array | None = None) -> Source:
    """What to read: a source as it is, a path opened, an array checked at the door."""
    if is_source(value):
        return open_source(value) if isinstance(value, (str, Path)) else value
    array = arguments.array(value, name) if beside is None else arguments.beside(value, name, beside)
    return DaskSource(array, name) if is_dask(array) else ArraySource(array, name)


def is_source(value: Any) -> bool:
    """A path, or what one gives when it is opened."""
    return isinstance(value, (str, Path)) or (hasattr(value, "read") and hasattr(value, "row_chunk"))
