"""Data sets of hidden states and a classifier: the numbers of stored logits, and the same bits however they are cut."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from distributed import Client, LocalCluster
from threadpoolctl import threadpool_info
from typer.testing import CliRunner

import gpuxent as gx
from gpuxent.backends import _linear
from gpuxent.cli import app
from gpuxent.evaluation.cluster import ClientWorkers, local_workers
from gpuxent.evaluation.driver import plan, rows_per_block, run_blocks, sized
from gpuxent.evaluation.evaluate import open_job
from gpuxent.evaluation.score import score
from gpuxent.evaluation.sources import linear

ROWS, FEATURES, VOCAB = 1000, 12, 90
RNG = np.random.default_rng(0)
HIDDEN = RNG.integers(-20, 21, (ROWS, FEATURES)).astype(np.float32) / 8
CLASSIFIER = RNG.integers(-16, 17, (VOCAB, FEATURES)).astype(np.float32) / 8
BIAS = RNG.integers(-8, 9, VOCAB).astype(np.float32) / 8
LOGITS = HIDDEN @ CLASSIFIER.T + BIAS  # exact
LABELS = np.where(RNG.random(ROWS) < 0.2, -100, RNG.integers(0, VOCAB, ROWS))
DOCUMENTS = np.arange(ROWS) // 17


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Of 128 rows, the least there are."""
    monkeypatch.setattr(_linear.tile_rows, "__defaults__", (1,))


@pytest.fixture
def files(tmp_path):
    np.save(tmp_path / "hidden.npy", HIDDEN)
    np.save(tmp_path / "labels.npy", LABELS)
    np.save(tmp_path / "documents.npy", DOCUMENTS)
    safetensors.numpy.save_file({"head.weight": CLASSIFIER, "head.bias": BIAS}, tmp_path / "model.safetensors")
    return tmp_path


def source(files):
    model = files / "model.safetensors"
    return gx.linear_logits(files / "hidden.npy", f"{model}::head.weight", f"{model}::head.bias")


def same(a, b):
    """All but the last bits, which exact products do not change either."""
    return a.to_dict() == b.to_dict()


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "shift": 1, "documents": DOCUMENTS, "min_context": 2}])
def test_the_numbers_of_stored_logits(options, files):
    expected = gx.evaluate(LOGITS, LABELS, **options)
    assert same(gx.evaluate(gx.linear_logits(HIDDEN, CLASSIFIER, BIAS), LABELS, **options), expected)
    assert same(gx.evaluate(source(files), files / "labels.npy", **options), expected)
    if not options:
        assert gx.perplexity(source(files), LABELS) == expected.perplexity == gx.perplexity(LOGITS, LABELS)


def test_bfloat16():
    hidden, classifier = HIDDEN.astype(ml_dtypes.bfloat16), CLASSIFIER.astype(ml_dtypes.bfloat16)
    found = gx.evaluate(gx.linear_logits(hidden, classifier), LABELS)
    assert same(found, gx.evaluate(HIDDEN @ CLASSIFIER.T, LABELS))


def test_a_vocabulary_larger_than_a_tile_is_read_in_whole_tiles(files):
    job = open_job(source(files), LABELS)
    assert rows_per_block(job, 1) == rows_per_block(job, 10**9) == 128


def random_job(**options):
    """Products that are not exact: their last bits depend on how they are cut."""
    rng = np.random.default_rng(1)
    hidden, classifier = rng.standard_normal((ROWS, 300), np.float32), rng.standard_normal((VOCAB, 300), np.float32)
    return open_job(gx.linear_logits(hidden, classifier), LABELS, **options)


def test_the_same_bits_on_any_threads_and_memory():
    job = random_job()
    expected = score(job).to_json()
    for n, memory in ((1, None), (2, 1), (2, 10**6), (1, 10**9)):
        with gx.threads(n):
            assert score(job, memory=memory).to_json() == expected


def test_the_same_bits_on_worker_processes(tmp_path):
    """Where BLAS has one thread, and here more."""
    rng = np.random.default_rng(1)
    np.save(tmp_path / "hidden.npy", rng.standard_normal((ROWS, 300), np.float32))
    np.save(tmp_path / "classifier.npy", rng.standard_normal((3000, 300), np.float32))
    np.save(tmp_path / "labels.npy", rng.integers(0, 3000, ROWS))
    job = open_job(gx.linear_logits(tmp_path / "hidden.npy", tmp_path / "classifier.npy"), tmp_path / "labels.npy")
    before = [pool["num_threads"] for pool in threadpool_info()]
    expected = score(job).to_json()
    assert [pool["num_threads"] for pool in threadpool_info()] == before
    with local_workers(2) as crew:
        assert score(job, workers=crew).to_json() == expected
        assert score(job, workers=ClientWorkers(crew._client), memory=10**6).to_json() == expected


def test_a_task_reads_whole_tiles(files):
    job = open_job(source(files), files / "labels.npy")
    expected = score(job).to_json()
    options = {"processes": False, "dashboard_address": None, "scheduler_kwargs": {"dashboard_address": "127.0.0.1:0"}}
    with LocalCluster(n_workers=2, threads_per_worker=1, **options) as cluster, Client(cluster) as client:
        crew = ClientWorkers(client)
        assert score(job, workers=crew).to_json() == expected
        sent, rows = sized(job, job.rows, crew)
        assert rows == 512
        assert sent.rows_at_once == 128
        results = list(run_blocks(sent, plan([range(ROWS)], rows), ClientWorkers(client)))
        assert sum(result.rows for result in results) == ROWS
        with pytest.raises(TypeError, match="got an array in memory"):
            gx.evaluate(gx.linear_logits(HIDDEN, CLASSIFIER), LABELS, client=client)


def test_the_classifier_is_loaded_once(files, monkeypatch):
    linear._LOADED.clear()
    reads = []
    rows = source(files)
    read = type(rows.classifier).read
    monkeypatch.setattr(type(rows.classifier), "read", lambda s, *a: (reads.append(s.name), read(s, *a))[1])
    gx.evaluate(rows, LABELS)
    assert sum("head.weight" in name for name in reads) == 1
    assert sum("head.bias" in name for name in reads) == 1
    assert sum("hidden" in name for name in reads) == 8


def test_a_run_goes_on_and_refuses_another_classifier(files):
    whole = gx.evaluate(source(files), LABELS, run=files / "whole")
    run = files / "run"
    job = open_job(source(files), LABELS)
    gx.evaluate(source(files), LABELS, run=run)
    assert gx.evaluate(source(files), LABELS, run=run, resume=True) == whole
    assert job.options["tile_rows"] == 128
    safetensors.numpy.save_file({"head.weight": 2 * CLASSIFIER, "head.bias": BIAS}, files / "model.safetensors")
    with pytest.raises(ValueError, match="classifier changed: a file was written to again"):
        gx.evaluate(source(files), LABELS, run=run, resume=True)


def test_on_the_command_line(files):
    model = files / "model.safetensors"
    given = ["--hidden", files / "hidden.npy", "--classifier", f"{model}::head.weight", "--bias", f"{model}::head.bias"]
    arguments = ["perplexity", *given, "--labels", files / "labels.npy", "--softcap", 5, "--format", "json"]
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    expected = gx.evaluate(LOGITS, LABELS, softcap=5.0)
    assert printed["perplexity"] == expected.perplexity
    assert printed["run"]["classifier"] == f"{model}::head.weight"
    assert "logits" not in printed["run"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--labels", "y.npy"],
        ["x.npy", "--hidden", "h.npy", "--classifier", "w.npy", "--labels", "y.npy"],
        ["--hidden", "h.npy", "--labels", "y.npy"],
        ["x.npy", "--bias", "b.npy", "--labels", "y.npy"],
    ],
)
def test_either_logits_or_hidden_states(arguments):
    result = CliRunner().invoke(app, ["perplexity", *arguments])
    assert result.exit_code == 2
    assert "either logits, or --hidden and --classifier" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("hidden", "classifier", "message"),
    [
        (HIDDEN, CLASSIFIER.T, r"classifier must have shape \(vocab, 12\) for hidden of shape \(1000, 12\)"),
        (HIDDEN, CLASSIFIER.astype(float), "classifier must have the dtype of hidden, float32, got float64"),
        (LABELS, CLASSIFIER, "hidden must be float16, bfloat16, float32 or float64, got int64"),
    ],
)
def test_factors_that_do_not_fit(hidden, classifier, message):
    with pytest.raises((ValueError, TypeError), match=message):
        gx.linear_logits(hidden, classifier)
