"""One thread pool for all CPU work. NumPy releases the GIL inside its loops, so plain threads are enough."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from itertools import pairwise
from threading import current_thread, main_thread
from typing import Any, TypeVar

Item = TypeVar("Item")

_limit: ContextVar[int | None] = ContextVar("gpuxent_threads", default=None)
_pool: ThreadPoolExecutor | None = None


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Limit the CPU threads that one gpuxent call uses, for the calls made inside the `with` block.

    n: at least 1. The default is the number of cores this process may use; inside a task of Dask (on threads, or on a
    distributed worker) it is 1, since Dask runs one task per core already. The limit belongs to the current thread or
    task (a context variable).
    Raises ValueError if n is no positive integer.

    >>> import gpuxent, numpy as np
    >>> with gpuxent.threads(1):
    ...     float(gpuxent.logsumexp(np.zeros(4)).round(4))
    1.3863
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n must be a positive number of threads, got {n!r}")
    token = _limit.set(n)
    try:
        yield
    finally:
        _limit.reset(token)


def one_blas_thread() -> Any:
    """From now on, or as a context, in the whole process: another number may change the last bits of a product."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")


def thread_count() -> int:
    return _limit.get() or (1 if _in_dask_task() else available_cores())


def _in_dask_task() -> bool:
    """Does a scheduler of Dask run this thread, beside others that keep the other cores busy?

    Each of them is asked only if it is loaded.
    """
    distributed = sys.modules.get("distributed.worker")
    if distributed is not None:
        with suppress(ValueError):  # this is no task
            return distributed.get_worker() is not None
    threaded, thread = sys.modules.get("dask.threaded"), current_thread()
    if threaded is None or thread is main_thread():
        return False
    pools = [threaded.default_pool, *(pool for pools in list(threaded.pools.values()) for pool in pools.values())]
    return any(thread.name.startswith(f"{pool._thread_name_prefix}_") for pool in pools if pool is not None)


def available_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def run(work: Callable[[Sequence[Item]], None], items: Sequence[Item]) -> None:
    """Call `work` on contiguous groups of the items, on as many threads as allowed; the first error is raised."""
    workers = min(thread_count(), len(items))
    if workers <= 1:
        if items:
            work(items)
        return
    groups = min(4 * workers, len(items))  # more groups than threads: a slow core gets fewer of them
    edges = [len(items) * g // groups for g in range(groups + 1)]
    pending = iter([items[a:b] for a, b in pairwise(edges)])

    def drain() -> None:
        for group in pending:  # a list iterator hands out each group once, from any thread
            work(group)

    helpers: list[Future[None]] = []
    with suppress(RuntimeError):  # Python is shutting down and starts no thread any more: the caller does it all
        helpers += [_executor().submit(drain) for _ in range(workers - 1)]
    try:
        drain()
    finally:
        for helper in helpers:
            if not helper.cancel():  # who has not even woken up is not waited for
                helper.result()


def _executor() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(available_cores(), thread_name_prefix="gpuxent")
    return _pool


def _forget_pool() -> None:
    """Threads do not survive a fork: the child makes its own pool."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
