"""On worker processes: the bits of one process, whatever dies, fails or is interrupted."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace

import cloudpickle
import dask
import dask.array as da
import distributed
import ml_dtypes
import numpy as np
import psutil
import pytest
import zarr
from distributed import LocalCluster
from odd_sources import Flaky, Poison, Slow, Told
from zarr.codecs import Crc32cCodec

import gpuxent as gx
from gpuxent.evaluation import cluster as clusters
from gpuxent.evaluation.cluster import ClientWorkers, local_workers
from gpuxent.evaluation.driver import ThreadWorkers, plan, run_blocks, sized
from gpuxent.evaluation.evaluate import open_job
from gpuxent.evaluation.runs.directory import Run
from gpuxent.evaluation.score import evaluate_job
from gpuxent.evaluation.sources import open_source

ROWS, VOCAB = 400, 150
ROW_BYTES = 4 * VOCAB
QUIET = {
    "dashboard_address": None,
    "scheduler_kwargs": {"dashboard_address": "127.0.0.1:0"},
    "silence_logs": logging.CRITICAL,
}

RNG = np.random.default_rng(5)
X = RNG.normal(0, 3, (ROWS, VOCAB)).astype(np.float32)
X[::7, 3] += 40  # confident rows
Y = np.where(RNG.random(ROWS) < 0.1, -100, RNG.integers(0, VOCAB, ROWS))
Y[::14] = 3
DOCUMENTS = np.cumsum(RNG.random(ROWS) < 0.05)


def save_zarr(path, array, chunks, **how):
    attributes = {}
    if array.dtype == ml_dtypes.bfloat16:
        array, attributes = array.view(np.uint16), {"dtype": "bfloat16"}
    stored = zarr.create_array(path, shape=array.shape, dtype=array.dtype, chunks=chunks, attributes=attributes, **how)
    stored[:] = array
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Logits in two dtypes and two formats beside their labels and documents."""
    folder = tmp_path_factory.mktemp("data")
    for dtype in (np.float32, ml_dtypes.bfloat16):
        np.save(folder / f"{np.dtype(dtype)}.npy", X.astype(dtype))
        save_zarr(folder / f"{np.dtype(dtype)}.zarr", X.astype(dtype), (16, VOCAB))
    np.save(folder / "labels.npy", Y)
    np.save(folder / "documents.npy", DOCUMENTS)
    return folder


def job_of(data, logits="float32.npy", **options):
    logits = data / logits if isinstance(logits, str) else logits
    return open_job(logits, data / "labels.npy", documents=data / "documents.npy", shift=1, **options)


def results_of(job, rows, workers):
    return list(run_blocks(job, plan([range(job.rows)], rows), workers))


def merged(job, results):
    """Of every row once."""
    blocks = sorted((result.first, result.first + result.rows) for result in results)
    assert [first for first, _ in blocks] == [0, *(stop for _, stop in blocks[:-1])]
    assert blocks[-1][1] == job.rows
    summary = job.identity()
    for result in results:
        summary = summary.merge(result.summary)
    return summary.to_json()


def alone(job):
    """In this thread and in one piece."""
    with gx.threads(1):
        return job.score(0, job.rows).summary.to_json()


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


# ---- the same bits ----


@pytest.fixture(scope="module")
def growing():
    """One cluster that gets more workers."""
    with LocalCluster(n_workers=0, threads_per_worker=1, **QUIET) as cluster, cluster.get_client() as client:
        yield cluster, client


def every_cut(data):
    for dtype in ("float32", "bfloat16"):
        for logits in (f"{dtype}.npy", f"{dtype}.zarr"):
            job = job_of(data, logits)
            for rows in (ROWS, 157, 64, 33, 16):
                yield job, rows


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_workers_give_the_bits_of_one_process(data, growing, processes):
    cluster, client = growing
    cluster.scale(processes)
    client.wait_for_workers(processes)
    for job, rows in every_cut(data):
        results = results_of(job, rows, ClientWorkers(client))
        assert merged(job, results) == alone(job), (job.logits.name, rows)
    assert len(client.nthreads()) == processes


def test_every_worker_gets_blocks(data, two, tmp_path):
    """The scheduler would give all to the one that has the job."""
    crew = two()
    job = job_of(data, Told(open_source(data / "float32.npy"), str(tmp_path)))
    results_of(job, 16, crew)
    told = Counter(file.name.partition("-")[0] for file in tmp_path.iterdir())
    assert len(told) == 2
    assert sum(told.values()) == ROWS // 16


@pytest.mark.parametrize("memory", [None, 6 * 5 * (ROW_BYTES + 256)])
def test_a_task_reads_piece_by_piece(data, two, memory):
    """With tokens, in order."""
    job, crew = replace(job_of(data), keep_tokens=True), two()
    sizes = []
    job_of_workers, rows = sized(job, job.rows, crew, memory)
    for result in results_of(job_of_workers, rows, crew):
        sizes.append(result.rows)
        whole = job.score(result.first, result.first + result.rows)
        assert result.summary.to_json() == whole.summary.to_json()
        for name, column in whole.tokens.columns.items():
            assert np.array_equal(result.tokens.columns[name], column)
    assert sum(sizes) == ROWS
    assert job_of_workers.rows_at_once == (ROWS // 2 if memory is None else 10)


@pytest.mark.parametrize("n", [1, 2])
def test_threads_give_the_bits_of_one_process(data, n):
    for job, rows in every_cut(data):
        with gx.threads(n):
            results = results_of(job, rows, ThreadWorkers(1000))
        assert merged(job, results) == alone(job), (job.logits.name, rows)


# ---- what dies, what fails ----


@pytest.fixture(scope="module")
def two():
    """Makes `--workers 2`, over and over on the same two processes. They die of a block twice, not four times."""
    with dask.config.set({"distributed.scheduler.allowed-failures": 1}), local_workers(2) as first:
        yield lambda: ClientWorkers(first._client, computing=1)


def kill_one(client, turn):
    pids = [pid for pid in client.run(os.getpid, on_error="ignore").values() if isinstance(pid, int)]
    if pids:
        os.kill(pids[turn % len(pids)], signal.SIGKILL)
    return len(pids) > 0


def test_a_worker_killed_every_second_costs_time_and_no_row(data, two):
    workers, kills, last = two(), 0, time.monotonic()
    job, results = job_of(data, Slow(open_source(data / "float32.npy"), 0.1)), []
    for result in run_blocks(job, plan([range(ROWS)], 3), workers):
        results.append(result)
        if time.monotonic() - last > 1 and kills < 4:
            kills += kill_one(workers._client, kills)
            last = time.monotonic()
    assert kills >= 2
    assert merged(job, results) == alone(job_of(data))


def test_a_block_that_kills_is_named_and_all_others_are_kept(data, two, tmp_path):
    workers, source = two(), open_source(data / "float32.npy")
    with pytest.raises(RuntimeError, match=r"float32\.npy: every worker that scored rows \d+ to \d+ alone") as caught:
        evaluate_job(job_of(data, Poison(source, 155)), run=tmp_path / "run", workers=workers, memory=6_000)
    first, stop = map(int, re.search(r"rows (\d+) to (\d+) alone", str(caught.value)).groups())
    assert first <= 155 < stop < first + 20
    with Run.open(tmp_path / "run") as run:
        assert run.finished == [range(first), range(stop, ROWS)]
    result = evaluate_job(job_of(data), run=tmp_path / "run", resume=True)
    assert result == evaluate_job(job_of(data))


def test_a_corrupt_chunk_is_named_as_it_is_without_workers(data, two, tmp_path):
    path = save_zarr(tmp_path / "x.zarr", X, (16, VOCAB), compressors=[Crc32cCodec()])
    chunk = path / "c" / "9" / "0"
    damaged = bytearray(chunk.read_bytes())
    damaged[100] ^= 1
    chunk.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"x\.zarr cannot be read at rows 144:160: .*checksum") as here:
        results_of(job_of(data, path), 16, ThreadWorkers(10))
    with pytest.raises(ValueError, match="checksum") as there:
        results_of(job_of(data, path), 16, two())
    assert str(there.value) == str(here.value)


def test_a_file_that_is_cut_short_meanwhile_is_named(data, two, tmp_path):
    np.save(tmp_path / "x.npy", X)
    job, results = job_of(data, Slow(open_source(tmp_path / "x.npy"), 0.05)), []

    def read():
        for result in run_blocks(job, plan([range(ROWS)], 5), two()):
            results.append(result)
            os.truncate(tmp_path / "x.npy", 1000)

    with pytest.raises(ValueError, match=r"x\.npy changed while it was read: 240,128 bytes -> 1,000 bytes"):
        read()
    assert 0 < len(results) < 80


def test_a_file_server_that_comes_back_is_no_error(data, two, tmp_path):
    job = job_of(data, Flaky(open_source(data / "float32.npy"), 155, str(tmp_path / "failed")))
    results = results_of(job, 10, two())
    assert (tmp_path / "failed").exists()
    assert merged(job, results) == alone(job_of(data))


def test_a_bad_label_is_named_by_its_row(data, two, tmp_path):
    bad = Y.copy()
    bad[311] = VOCAB
    np.save(tmp_path / "labels.npy", bad)
    job = open_job(data / "float32.npy", tmp_path / "labels.npy")
    with pytest.raises(IndexError, match=rf"labels\[311\] is {VOCAB}, expected a class in \[0, {VOCAB}\)"):
        results_of(job, 10, two())


def test_labels_may_be_in_memory(data, two):
    job = open_job(data / "float32.npy", Y, documents=DOCUMENTS, shift=1)
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "5kB"}):  # they are sent once
        assert merged(job, results_of(job, 30, two())) == alone(job_of(data))


# ---- clusters of a thread, behind TLS ----


@pytest.fixture(scope="module")
def tls():
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, security=True, **QUIET) as cluster,
        cluster.get_client() as client,
    ):
        assert client.scheduler.address.startswith("tls://")
        yield cluster, client


def test_evaluate_on_a_client(data, tls):
    _, client = tls
    files = {"documents": data / "documents.npy", "shift": 1}
    found = gx.evaluate(data / "float32.npy", data / "labels.npy", client=client, memory=20_000, **files)
    assert found == gx.evaluate(X, Y, documents=DOCUMENTS, shift=1)


def test_arrays_in_memory_are_refused(tls, tmp_path):
    _, client = tls
    with pytest.raises(TypeError, match="logits must be a file or an array of Dask for the workers of a cluster"):
        gx.evaluate(X, Y, client=client, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(TypeError, match=r"client must be a distributed\.Client that is not asynchronous, got 'tls:"):
        gx.evaluate(da.from_array(X), Y, client="tls://x")


@pytest.mark.parametrize(
    "chunks",
    [(50, VOCAB), ((130, 20, 250), (90, 60)), ((1, 0, 399), (VOCAB,))],
    ids=["rows", "rows and vocabulary", "empty"],
)
def test_arrays_of_dask_on_a_client(tls, chunks):
    _, client = tls
    x, options = da.from_array(X, chunks=chunks), {"documents": DOCUMENTS, "shift": 1}
    with dask.config.set(scheduler="synchronous"):
        here = merged(job := open_job(x, Y, **options), results_of(job, 60, ThreadWorkers(10)))
    found = merged(
        job := open_job(x, da.from_array(Y, chunks=70), **options), results_of(job, 60, ClientWorkers(client))
    )
    assert found == here
    if len(x.chunks[1]) == 1:
        assert found == alone(open_job(X, Y, **options))


def test_arrays_of_dask_are_computed_by_the_client_in_use(tls):
    def on_worker(block):
        distributed.get_worker()
        return block

    x = da.from_array(X, chunks=(100, VOCAB)).map_blocks(on_worker, dtype=X.dtype, meta=X[:0])
    assert gx.evaluate(x, Y) == gx.evaluate(X, Y)


def test_what_is_persisted_is_not_computed_again(tls, tmp_path):
    log = tmp_path / "log"

    def counted(block):
        with log.open("a") as file:
            file.write(f"{len(block)} ")
        return block

    x = da.from_array(X, chunks=(100, VOCAB)).map_blocks(counted, dtype=X.dtype, meta=X[:0]).persist()
    assert gx.evaluate(x, Y) == gx.evaluate(X, Y)
    assert log.read_text() == "100 100 100 100 "


def test_a_block_of_dask_is_sent_alone_and_forgotten(tls, monkeypatch):
    cluster, client = tls
    sent, compute = [], client.compute

    def seen(task, **how):
        sent.append(dict(task.__dask_graph__()))
        return compute(task, **how)

    monkeypatch.setattr(client, "compute", seen)
    job = open_job(da.from_array(X, chunks=(10, VOCAB)), Y)
    merged(job, results_of(job, 10, ClientWorkers(client)))
    assert len(sent) == 40
    assert max(map(len, sent)) == 3  # the chunk, the rows of it, their scores
    # the logits, and of labels, positions and code a little
    assert max(len(cloudpickle.dumps(graph)) for graph in sent) < 10 * ROW_BYTES + 10_000
    wait_until(lambda: not cluster.scheduler.tasks)


def test_tasks_of_a_lazy_loss_hold_their_own_chunk_alone():
    loss = gx.cross_entropy(da.from_array(X, chunks=(10, VOCAB)), Y, reduction="none")
    (optimized,) = dask.optimize(loss)
    tasks = dict(optimized.__dask_graph__()).values()
    assert len(tasks) > 40
    assert max(len(cloudpickle.dumps(task)) for task in tasks) < 10 * ROW_BYTES + 10_000


def test_a_bad_label_of_an_array_of_dask_waits_for_what_is_in_flight(tls):
    _, client = tls
    bad = Y.copy()
    bad[311] = VOCAB
    job, results = open_job(da.from_array(X, chunks=(10, VOCAB)), bad), []
    with pytest.raises(IndexError, match=r"labels\[311\]"):
        results += run_blocks(job, plan([range(ROWS)], 10, job.logits.row_edges), ClientWorkers(client))
    assert {result.first for result in results} >= set(range(0, 310, 10))


# ---- no workers, no scheduler ----


def test_a_cluster_without_workers_is_given_up(data, monkeypatch):
    monkeypatch.setattr(clusters, "PATIENCE", 0.5)
    monkeypatch.setattr(clusters, "COUNT_AFTER", 0.05)
    with LocalCluster(n_workers=0, processes=False, **QUIET) as cluster, cluster.get_client() as client:
        with pytest.raises(TimeoutError, match=r"the cluster inproc://.* has had no worker for 0\.5 s"):
            ClientWorkers(client)
        cluster.scale(1)
        client.wait_for_workers(1)
        job, results = job_of(data, Slow(open_source(data / "float32.npy"), 0.05)), []

        def run():
            for result in run_blocks(job, plan([range(ROWS)], 4), ClientWorkers(client)):
                results.append(result)
                cluster.scale(0)

        with pytest.raises(TimeoutError, match="has had no worker"):
            run()
        assert 0 < len(results) < 100


def test_a_scheduler_that_goes_ends_the_run(data):
    """At once, with results that are there already."""
    cluster = LocalCluster(n_workers=1, processes=False, **QUIET)
    with distributed.Client(cluster.scheduler_address, timeout=0.2) as client:
        job, results = job_of(data, Slow(open_source(data / "float32.npy"), 0.05)), []

        def run():
            for result in run_blocks(job, plan([range(ROWS)], 4), ClientWorkers(client)):
                results.append(result)
                cluster.close()

        with pytest.raises(ConnectionError, match=r"the connection to the scheduler inproc://.* was lost"):
            run()
    assert 0 < len(results) < 100


# ---- the command ----

COMMAND = [sys.executable, "-c", "from gpuxent.cli import main; main()", "perplexity"]


def start(data, *options, stderr=subprocess.PIPE, **environment):
    arguments = [
        str(data / "float32.npy"),
        "--labels",
        str(data / "labels.npy"),
        "--format",
        "json",
        "--backend",
        "numpy",
        *options,
    ]
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "error", **environment},
        start_new_session=True,
    )


def command(data, *options, **environment):
    process = start(data, *options, **environment)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def numbers(text):
    """The result without the description of the run."""
    found = json.loads(text)
    del found["run"]
    return found


@pytest.fixture(scope="module")
def in_one_process(data):
    code, out, err = command(data)
    assert code == 0, err
    return numbers(out)


def test_workers_of_the_command(data, in_one_process):
    """Beside another cluster: the port that Dask would like is taken."""
    with socket.socket() as taken:
        with suppress(OSError):  # it is already
            taken.bind(("127.0.0.1", 8787))
            taken.listen()
        code, out, err = command(data, "--workers", 2, "--memory", "20kB")
    assert code == 0, err
    assert all(" rows (" in line for line in err.splitlines()), err
    assert numbers(out) == in_one_process


def test_a_scheduler_with_certificates_from_dasks_configuration(data, tls, in_one_process, tmp_path):
    cluster, client = tls
    pems = {"CA_FILE": "tls_ca_file", "CLIENT__CERT": "tls_client_cert", "CLIENT__KEY": "tls_client_key"}
    environment = {}
    for name, attribute in pems.items():
        (tmp_path / name).write_text(getattr(cluster.security, attribute))
        environment[f"DASK_DISTRIBUTED__COMM__TLS__{name}"] = str(tmp_path / name)
    code, out, err = command(data, "--scheduler", client.scheduler.address, **environment)
    assert code == 0, err
    assert numbers(out) == in_one_process


def test_a_scheduler_that_is_not_there(data, monkeypatch):
    monkeypatch.setattr(clusters, "PATIENCE", 0.3)
    with (
        pytest.raises(OSError, match=r"^--scheduler tcp://127.0.0.1:9: Timed out"),
        clusters.workers_at("tcp://127.0.0.1:9"),
    ):
        pass


# Of `--gpus`: the client process never looks for CuPy.
ON_GPUS = """
import sys

class NoCupy:
    @staticmethod
    def find_spec(name, path=None, target=None):
        assert name.partition(".")[0] != "cupy", "the client looked for CuPy"

sys.meta_path.insert(0, NoCupy)
"""

# A machine that seems to have a GPU, and workers that have none.
PRETEND = """
import types
import distributed
from distributed.diagnostics import nvml

count, nvml.device_get_count = nvml.device_get_count, lambda: 1

def cluster(*, device_memory_limit, **options):
    nvml.device_get_count = count
    return distributed.LocalCluster(n_workers=1, **options)

sys.modules["dask_cuda"] = types.SimpleNamespace(LocalCUDACluster=cluster)
"""


def on_gpus(data, code, *options):
    arguments = [data / "float32.npy", "--labels", data / "labels.npy", *options]
    code = f"{code}\nfrom gpuxent.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "perplexity", *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.mark.skipif(distributed.diagnostics.nvml.device_get_count() > 0, reason="there is a GPU")
def test_no_gpu_is_said_in_one_sentence(data):
    done = on_gpus(data, ON_GPUS, "--gpus", "all")
    sentence = "--gpus all: no GPU was found on this machine (NVML sees none)"
    assert (done.returncode, done.stdout, done.stderr) == (3, "", f"gpuxent: {sentence}\n")


@pytest.mark.skipif(distributed.diagnostics.nvml.device_get_count() > 0, reason="there is a GPU")
def test_gpus_are_the_workers_affair(data):
    done = on_gpus(data, ON_GPUS + PRETEND, "--gpus", "all")
    assert (done.returncode, done.stdout) == (3, "")
    assert re.fullmatch(r"gpuxent: .*(CuPy|GPU).*\n", done.stderr)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--gpus", "2"], "--gpus must be all, got '2'; CUDA_VISIBLE_DEVICES chooses among them"),
        (["--workers", "2", "--gpus", "all"], "--workers and --gpus exclude each other"),
        (["--workers", "2", "--scheduler", "tcp://x"], "--workers and --scheduler exclude each other"),
    ],
)
def test_workers_that_exclude_each_other(options, sentence):
    asked = dict(zip(options[::2], options[1::2], strict=True))
    with (
        pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"),
        clusters.workers(asked.get("--workers"), asked.get("--scheduler"), asked.get("--gpus")),
    ):
        pass


@pytest.fixture(scope="module")
def many_blocks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    rng = np.random.default_rng(0)
    np.save(folder / "float32.npy", rng.normal(0, 3, (20_000, 50)).astype(np.float32))
    np.save(folder / "labels.npy", rng.integers(0, 50, 20_000))
    return folder


def commits(run):
    """What the run has written so far, roughly: it grows with the first blocks."""
    log = run / "ledger.sqlite-wal"
    return log.stat().st_size if log.exists() else 0


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_with_workers(many_blocks, tmp_path, times):
    """A terminal sends it to all processes of the command."""
    run, err = tmp_path / "run", tmp_path / "stderr"
    with open(err, "w") as file:
        process = start(many_blocks, "--workers", 2, "--memory", "4kB", "-o", run, stderr=file)
    wait_until(lambda: commits(run) > 500_000)
    group = [process, *psutil.Process(process.pid).children(recursive=True)]
    os.killpg(process.pid, signal.SIGINT)
    wait_until(lambda: "interrupted" in err.read_text() or process.poll() is not None)
    assert "interrupted: the blocks in flight are being finished; once more to stop now" in err.read_text()
    if times == 2:
        os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    said = err.read_text()
    assert process.returncode == 4, said
    assert "Traceback" not in said
    wait_until(lambda: not any(psutil.pid_exists(member.pid) for member in group))
    with Run.open(run) as left:
        finished, share = left.finished, left.finished_rows / left.rows
    assert 0 < share < 1
    if out:
        assert numbers(out)["share"] == share
        assert finished == [range(finished[0].stop)]  # of blocks begun in order, all that were begun
    else:
        assert times == 2
    if times == 2:
        code, out, err = command(many_blocks, "--resume", "-o", run)
        assert code == 0, err
        assert numbers(out) == numbers(command(many_blocks)[1])
