"""Two models' rows on the GPU: which kernel of pairs.cu, and what it is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy

from gpuxent._records import DIVERGENCES, IDENTITY, Divergences, PairStats, RowStats, Transform
from gpuxent.backends import _cupy_core as core
from gpuxent.backends._cupy_jobs import Job, Record, here, kernel_of, shared_for_l2, stretches, whole_vectors

MOST_THREADS = 256


def pair_stats(
    base: cupy.ndarray,
    other: cupy.ndarray,
    labels: cupy.ndarray | None = None,
    *,
    transforms: tuple[Transform, Transform] = (IDENTITY, IDENTITY),
    divergences: Sequence[str] = DIVERGENCES,
    also: Sequence[str] = (),
) -> PairStats:
    """Statistics and divergences of two models' rows, in one read of memory where both rows can be kept near."""
    pair = _Pair(base, other, labels, transforms)
    records = []
    for job in pair.jobs:
        job.features(also)
        records.append(Record(job.how, job.rows))
        job.point(**records[-1].arrays)
    found = pair.launch(*pair.whole_rows())
    p, q = (record.stats(job.shape) for record, job in zip(records, pair.jobs, strict=True))
    return PairStats(p, q, pair.named(divergences, found))


def divergence_sums(
    p: cupy.ndarray,
    q: cupy.ndarray,
    p_stats: RowStats,
    q_stats: RowStats,
    *,
    transforms: tuple[Transform, Transform] = (IDENTITY, IDENTITY),
    divergences: Sequence[str] = DIVERGENCES,
) -> Divergences:
    """What (a slice of) the rows adds to the divergences that are named, given the statistics of whole rows."""
    pair = _Pair(p, q, None, transforms)
    for job, stats in zip(pair.jobs, (p_stats, q_stats), strict=True):
        job.point(max=stats.max, rest=stats.rest)
    kernel = core.pair_kernels(*pair.types())[-1]
    return pair.named(divergences, pair.launch(kernel, 1, core.BLOCK_SHARED))


class _Pair:
    """A job for each side, whose kernels run over both."""

    def __init__(
        self,
        base: cupy.ndarray,
        other: cupy.ndarray,
        labels: cupy.ndarray | None,
        transforms: tuple[Transform, Transform],
    ) -> None:
        sides = zip((base, other), transforms, strict=True)
        self.jobs = [Job(logits, labels, 0, None, transform) for logits, transform in sides]
        self.tempered = any(transform.temperature != 1 for transform in transforms)

    def types(self) -> tuple[Any, ...]:
        """What the kernels are compiled for."""
        base, other = self.jobs
        return (base.logit, other.logit), (base.how, other.how), self.tempered

    def whole_rows(self) -> tuple[str, int, int]:
        """(kernel, blocks for each pair, bytes of shared memory): of the rows and the chip alone, so that the bits of a
        row depend on nothing else."""
        chip, vocab, types = here(), self.jobs[0].vocab, self.types()
        copied, from_l2, _ = core.pair_kernels(*types)
        share = core.BLOCK_SHARED + self._bytes_of(core.piece_columns(vocab, core.CLUSTER))
        whole = core.BLOCK_SHARED + self._bytes_of(vocab)
        if 2 * (whole + core.SYSTEM_SHARED) <= chip.shared_per_multiprocessor and whole <= chip.shared_per_block:
            return copied, 1, whole
        if chip.arch >= 90 and share <= chip.shared_per_block:
            return core.cluster_pairs(*types), core.CLUSTER, share
        if whole <= chip.shared_per_block:
            return copied, 1, whole
        return from_l2, 1, shared_for_l2(chip, sum(job.row_bytes for job in self.jobs), MOST_THREADS)

    def _bytes_of(self, columns: int) -> int:
        return sum(whole_vectors(columns * job.itemsize) for job in self.jobs)

    def launch(self, kernel: str, blocks_per_row: int, shared: int) -> cupy.ndarray:
        """The four divergences of every row, (rows, 4)."""
        base, other = self.jobs
        found = cupy.empty((base.rows, len(DIVERGENCES)))
        if not base.rows:
            return found
        run = kernel_of(kernel, cupy.cuda.Device().id)
        threads = min(MOST_THREADS, -(-base.vocab * min(base.itemsize, other.itemsize) // (32 * core.VECTOR)) * 32)
        sides = {"logits": base.arrays["logits"], "other": other.arrays["logits"]}
        for first, rows, layout in stretches(base.shape, sides):
            layout |= {"rows": rows, "slices": blocks_per_row}
            swapped = {name.replace("other", "logits"): layout[name] for name in layout if "logits" not in name}
            tasks = (base.task(first, layout), other.task(first, swapped))
            run((rows * blocks_per_row,), (threads,), (*tasks, found[first:]), shared_mem=shared)
        return found

    def named(self, divergences: Sequence[str], found: cupy.ndarray) -> Divergences:
        columns = {name: found[:, i].reshape(self.jobs[0].shape) for i, name in enumerate(DIVERGENCES)}
        return Divergences(**{name: columns[name] for name in divergences})
