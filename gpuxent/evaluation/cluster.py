"""Blocks on the workers of a `distributed.Client`: processes of this machine, a cluster, one for each GPU."""

from __future__ import annotations

import logging
import pickle
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from queue import Empty, SimpleQueue
from threading import Semaphore
from typing import Any

from gpuxent.backends._threads import available_cores, one_blas_thread, threads
from gpuxent.evaluation.driver import BLOCK_BYTES, READERS, TASK_READS, Done, WorkerDied
from gpuxent.evaluation.job import Job, Labelled, on_cpu
from gpuxent.evaluation.runs.fingerprint import computed_by
from gpuxent.evaluation.sources import ArraySource
from gpuxent.evaluation.statistics.tokens import BlockResult

PATIENCE = 60.0  # seconds without a worker before giving up
COUNT_AFTER = 5.0  # seconds between two looks at how many workers there are


class ClientWorkers:
    """The workers that a `distributed.Client` has now and gets later. In flight is a block for each of their threads,
    and one more for each that computes.

    `computing` is how many blocks a worker process scores at once, while its other threads read; None: all of them.
    """

    read_bytes, reads = BLOCK_BYTES, TASK_READS

    def __init__(self, client: Any, computing: int | None = None) -> None:
        if not hasattr(client, "nthreads") or client.asynchronous:
            raise TypeError(f"client must be a distributed.Client that is not asynchronous, got {client!r}")
        self._client, self._computing_each = client, computing
        self._done: SimpleQueue[tuple[range, Any]] = SimpleQueue()
        self._jobs: dict[int, Any] = {}
        self._futures: dict[range, Any] = {}
        self._sent_to: dict[range, str | None] = {}
        try:
            client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError:
            raise self._no_worker() from None
        self._count_threads()

    @property
    def slots(self) -> int:
        return max(1, sum(self._threads_of.values())) + self.computing

    def _count_threads(self) -> None:
        try:
            self._threads_of: dict[str, int] = self._client.nthreads()
        except OSError as error:
            raise self._lost() from error
        self._counted, found = time.monotonic(), self._threads_of.values()
        if found:
            self._last_seen = self._counted
        elif self._counted - self._last_seen > PATIENCE:
            raise self._no_worker()
        self.at_once = max(found, default=1)
        self.computing = max(1, sum(min(count, self._computing_each or count) for count in found))

    def _least_busy(self) -> str | None:
        """Left to itself the scheduler gives all blocks to the worker that has the job."""
        sent = Counter(self._sent_to.values())
        return min(self._threads_of, key=lambda worker: sent[worker] / self._threads_of[worker], default=None)

    def _no_worker(self) -> TimeoutError:
        return TimeoutError(f"the cluster {_address(self._client)} has had no worker for {PATIENCE:g} s")

    def _lost(self) -> ConnectionError:
        return ConnectionError(f"the connection to the scheduler {_address(self._client)} was lost")

    def submit(self, job: Job, block: range) -> None:
        if hasattr(job.logits, "row_edges"):
            try:
                future = self._submit_dask(job, block)
            except Exception as error:  # of a bad label: it waits for the blocks in flight
                self._done.put((block, error))
                return
        else:
            self._sent_to[block] = worker = self._least_busy()
            future = self._client.submit(
                score_block,
                *(self._sent(job), block.start, block.stop, self._computing_each),
                pure=False,
                retries=0,
                workers=worker,
                allow_other_workers=worker is not None,
            )
        self._futures[block] = future
        self._tell_when_done(block, future)

    def _tell_when_done(self, block: range, future: Any) -> None:
        future.add_done_callback(lambda done: self._done.put((block, done)))

    def _sent(self, job: Job) -> Any:
        """The job as the result of a task: each worker fetches it once, and a new one can have it made again."""
        if id(job) not in self._jobs:
            check_reachable(job)
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # that labels in memory are large
                self._jobs[id(job)] = self._client.submit(pickle.loads, pickle.dumps(job), pure=False)
        return self._jobs[id(job)]

    def _submit_dask(self, job: Job, block: range) -> Any:
        """Of an array of Dask what makes the rows, cut out of its graph, and one task that scores them. Labels are read
        here: they may be of Dask, too."""
        import dask

        labelled = job.labelled(block.start, block.stop)
        logits = job.logits.read(slice(block.start, block.stop), slice(None))
        nothing: dict[str, Any] = dict.fromkeys(job.sources)
        scored = dask.delayed(score_computed, pure=False)(
            replace(job, **nothing), job.kind, block.start, labelled, logits, logits.chunks
        )
        (task,) = dask.optimize(scored)
        return self._client.compute(task, optimize_graph=False)

    def next(self, timeout: float) -> Done | None:
        if time.monotonic() - self._counted > COUNT_AFTER:
            self._count_threads()
        try:
            block, future = self._done.get(timeout=timeout)
        except Empty:
            return None
        if isinstance(future, Exception):
            return Done(block, error=future)
        failed = future.status in ("error", "cancelled")
        try:
            result = future.result(timeout=PATIENCE)
        except TimeoutError as error:
            if not failed:  # the result went with its worker, and no other has come to score the block again
                self._tell_when_done(block, future)
                return None
            result = error
        except Exception as error:
            result = self._explained(error)
        del self._futures[block]
        self._sent_to.pop(block, None)
        return Done(block, error=result) if isinstance(result, Exception) else Done(block, result)

    def _explained(self, error: Exception) -> Exception:
        from distributed.client import FutureCancelledError
        from distributed.comm import CommClosedError
        from distributed.scheduler import KilledWorker

        cancelled = isinstance(error, FutureCancelledError)
        if isinstance(error, CommClosedError) or (cancelled and "connection-lost" in str(error)):
            return self._lost()
        if not cancelled and not isinstance(error, KilledWorker):
            return error
        self._jobs.clear()  # it may have been lost, too: it is sent again
        return WorkerDied(one_line(error))

    def close(self) -> None:
        if self._client.status == "running":  # else the scheduler is gone, and with it what it would forget
            self._client.cancel([*self._futures.values(), *self._jobs.values()], force=True)
        for of_this_pass in (self._futures, self._sent_to, self._jobs):
            of_this_pass.clear()


def check_reachable(job: Job) -> None:
    """TypeError if workers cannot read the logits."""
    for name, source in getattr(job.logits, "sides", {"logits": job.logits}).items():
        if isinstance(getattr(source, "hidden", source), ArraySource):
            raise TypeError(
                f"{name} must be a file or an array of Dask for the workers of a cluster, got an array in memory"
            )


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _address(client: Any) -> str:
    return client.scheduler.address if client.scheduler else "of a closed client"


def score_block(job: Job, first: int, stop: int, computing: int | None) -> BlockResult:
    """The task of a worker."""
    if job.has_products:
        _one_blas_thread()
    with threads(1):
        return job.score(first, stop, nullcontext() if computing is None else _gate(computing))


def score_computed(job: Job, kind: str | None, first: int, labelled: Labelled, logits: Any, chunks: Any) -> BlockResult:
    """The task of a worker that has the rows in memory."""
    import dask.array as da

    if len(chunks[-1]) > 1:  # slices of the vocabulary are scored and merged, as they are without a cluster
        logits = da.from_array(logits, chunks=chunks)
    with threads(1):
        scores = on_cpu(job.row_scores(logits, labelled.classes))
        return job.block_result(first, labelled, scores, computed_by(kind))


@cache
def _one_blas_thread() -> None:
    """For as long as the process lives, as Dask sets it up by default."""
    one_blas_thread()


@cache
def _gate(computing: int) -> Semaphore:
    """One for the process."""
    return Semaphore(computing)


@contextmanager
def local_workers(processes: int, computing: int | None = None) -> Iterator[ClientWorkers]:
    """Worker processes of this machine, each of which computes so many blocks at once (by default they share its
    cores) and reads ahead of that."""
    distributed = _distributed("--workers")
    computing = computing or max(1, available_cores() // processes)
    options = {"n_workers": processes, "threads_per_worker": computing + READERS, "processes": True}
    with _client_of(distributed.LocalCluster, options) as client:
        yield ClientWorkers(client, computing)


@contextmanager
def gpu_workers() -> Iterator[ClientWorkers]:
    """One worker process for each GPU of this machine. This process never touches CuPy: NVML counts the devices."""
    _distributed("--gpus")
    from distributed.diagnostics import nvml

    if nvml.device_get_count() == 0:
        raise ValueError("--gpus all: no GPU was found on this machine (NVML sees none)")
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise ModuleNotFoundError("--gpus needs dask-cuda: pip install 'gpuxent[gpus]'") from error
    options = {
        "threads_per_worker": 1 + READERS,  # one computes, the others read
        "protocol": "tcp",  # what workers send is small and on the CPU
        "device_memory_limit": None,
    }
    with _client_of(LocalCUDACluster, options) as client:
        yield ClientWorkers(client, computing=1)


@contextmanager
def _client_of(cluster_type: Any, options: dict[str, Any]) -> Iterator[Any]:
    """Of a cluster of this machine that ends with the context. Workers that die are started again, however often."""
    import dask
    from distributed import Client

    config = {
        # A worker that is being started again so long after its last death would be given up for lost.
        "distributed.deploy.lost-worker-timeout": "10000 days",
        "distributed.worker.profile.enabled": False,  # of what nobody looks at: 5 % of a core
    }
    quiet: dict[str, Any] = {
        "dashboard_address": None,
        "scheduler_kwargs": {"dashboard_address": "127.0.0.1:0"},  # its web server's; the default port may be taken
        "silence_logs": logging.CRITICAL,
    }
    with dask.config.set(config), cluster_type(**options, **quiet) as cluster, Client(cluster) as client:
        client.register_plugin(_interrupts_are_the_drivers())
        yield client


def _interrupts_are_the_drivers() -> Any:
    """Ctrl-C reaches every process of a terminal; the driver decides what it means."""
    from distributed import WorkerPlugin

    class IgnoreInterrupts(WorkerPlugin):
        def setup(self, worker: Any) -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    return IgnoreInterrupts()


@contextmanager
def workers_at(address: str) -> Iterator[ClientWorkers]:
    """Those of a running scheduler. Certificates for tls:// come from Dask's configuration (distributed.comm.tls)."""
    distributed = _distributed("--scheduler")
    with distributed.utils.silence_logging_cmgr(logging.CRITICAL):  # what is wrong is said once, and by us
        try:
            client = distributed.Client(address, timeout=PATIENCE)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise OSError(f"--scheduler {address}: {one_line(error)}") from error
        with client:
            yield ClientWorkers(client)


@contextmanager
def workers(processes: int | None, scheduler: str | None, gpus: str | None) -> Iterator[ClientWorkers | None]:
    """Those that the command line asks for with --workers, --scheduler or --gpus; None: threads of this process."""
    asked = {"--workers": processes, "--scheduler": scheduler, "--gpus": gpus}
    given = [option for option, value in asked.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other")
    if gpus not in (None, "all"):
        raise ValueError(f"--gpus must be all, got {gpus!r}; CUDA_VISIBLE_DEVICES chooses among them")
    if not given:
        yield None
    elif processes is not None:
        with local_workers(processes) as found:
            yield found
    else:
        with gpu_workers() if scheduler is None else workers_at(scheduler) as found:
            yield found


def parse_memory(text: str, option: str) -> int:
    """ "2GB" or "512 MiB" in bytes, as Dask writes them."""
    from dask.utils import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ValueError(f"{option} must be a size such as 2GB, got {text!r}") from error


def default_client() -> Any:
    """The client that Dask would compute on now, or None; `distributed` is not imported to find out."""
    import sys

    worker = sys.modules.get("distributed.client")
    if worker is None:
        return None
    try:
        return worker.default_client()
    except ValueError:
        return None


def _distributed(option: str) -> Any:
    try:
        import distributed
    except ImportError as error:
        raise ModuleNotFoundError(f"{option} needs distributed: pip install 'gpuxent[distributed]'") from error
    return distributed
