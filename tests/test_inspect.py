"""What is said of a file: storage, values, labels, and the cost of scoring it."""

import functools
import itertools
import json
import math
import tracemalloc

import h5py
import ml_dtypes
import numpy as np
import pytest
import zarr
from rich.console import Console
from test_convert import gpuxent, invoked, save

from gpuxent.evaluation.files import inspect, sampling

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = pytest.mark.parametrize(
    "dtype", [np.float16, BFLOAT16, np.float32, np.float64], ids=lambda d: np.dtype(d).name
)
V = 400


def facts(tmp_path, array, **options):
    return inspect.facts(save(tmp_path / "x.npy", np.asarray(array)), **options)


def log_softmax(x):
    """Row by row, with exact sums."""
    rows = []
    for row in x.tolist():
        high = max(row)
        lse = high + math.log(math.fsum(math.exp(v - high) for v in row))
        rows.append([v - lse for v in row])
    return np.array(rows)


@functools.cache
def _made(kind):
    random, rows = np.random.default_rng(0), 60
    x = random.normal(0, 3, (rows, V))
    x[: rows // 3, 7] += 20  # confident rows
    logp = log_softmax(x)
    if kind == "log-probabilities":
        return logp
    if kind == "probabilities":
        return np.exp(logp)
    if kind == "flat probabilities":
        return np.exp(log_softmax(x[rows // 3 :] / 6))
    if kind == "not quite probabilities":
        return np.exp(logp) * random.uniform(0.9, 1, (rows, 1))
    if kind == "softmax twice":
        return np.exp(log_softmax(np.exp(logp)))
    if kind == "in [0, 1]":
        return random.random((rows, V))
    if kind == "sigmoids":
        return 1 / (1 + np.exp(-x))
    if kind == "not positive":
        return -np.abs(x)
    if kind == "some of the classes":
        return np.where(random.random((rows, V)) < 0.5, logp, -np.inf)
    return x


def made(kind):
    return _made(kind).copy()


# ---- values ----


@FLOATS
@pytest.mark.parametrize(
    ("kind", "looks_like", "note"),
    [
        ("logits", "logits", None),
        ("log-probabilities", "log-probabilities", "log-softmax does not change them"),
        ("probabilities", "probabilities", "softmax to them again"),
        ("flat probabilities", "probabilities", "softmax to them again"),
        ("not quite probabilities", "logits in [0, 1]?", "not normalised"),
        ("softmax twice", "probabilities", "softmax applied twice, or an untrained model"),
        ("in [0, 1]", "logits in [0, 1]?", "the values do not tell"),
        ("sigmoids", "logits in [0, 1]?", "the values do not tell"),
        ("not positive", "logits", "and not 0: logits, or"),
        ("some of the classes", "logits", "probabilities of some of the classes"),
    ],
)
def test_kinds_are_told_apart(kind, looks_like, note, dtype, tmp_path):
    found = facts(tmp_path, made(kind).astype(dtype))
    assert found["looks_like"] == looks_like
    assert any(note in line for line in found["notes"]) if note else found["notes"] == []
    twice = any("softmax applied twice" in line for line in found["notes"])
    assert twice == (kind == "softmax twice")


def test_the_logarithm_of_softmax_twice(tmp_path):
    found = facts(tmp_path, log_softmax(made("probabilities")).astype(np.float32))
    assert found["looks_like"] == "log-probabilities"
    assert any("softmax applied twice" in line for line in found["notes"])


@FLOATS
def test_special_values_are_counted(dtype, tmp_path):
    x = made("logits").astype(dtype)
    x[3, 5:9], x[10, :20], x[11, 0], x[12] = np.nan, -np.inf, np.inf, -np.inf
    found = facts(tmp_path, x)
    seen = found["sample"]
    assert (seen["rows"], seen["values"], seen["bytes"]) == (60, 60 * V, x.nbytes)
    assert (seen["nan"], seen["minus_inf"], seen["plus_inf"]) == (4, 20 + V, 1)
    finite = [float(v) for v in x.ravel().tolist() if math.isfinite(v)]
    assert (seen["least"], seen["greatest"]) == (min(finite), max(finite))
    assert found["looks_like"] == "logits"


def test_a_row_with_nan_does_not_hide_the_others(tmp_path):
    x = made("probabilities")
    x[5, 7] = np.nan
    assert facts(tmp_path, x)["looks_like"] == "probabilities"


def test_sums_of_rows(tmp_path):
    x = made("logits").astype(np.float32)
    seen = facts(tmp_path, x)["sample"]
    sums = [math.fsum(row) for row in x.tolist()]
    lses = (x.astype(np.float64) - log_softmax(x))[:, 0].tolist()
    assert list(seen["row_sum"].values()) == pytest.approx([min(sums), max(sums)], rel=1e-6)
    assert list(seen["row_logsumexp"].values()) == pytest.approx([min(lses), max(lses)], rel=1e-6)


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_nothing_finite(value, tmp_path):
    found = facts(tmp_path, np.full((5, 9), value))
    assert found["looks_like"] == "nothing"
    assert found["sample"]["least"] is None
    json.dumps(found, allow_nan=False)


def test_rows_never_written(tmp_path):
    x = made("logits")
    x[40:] = 0
    assert "20 of 60 sampled rows have one value only: never written?" in facts(tmp_path, x)["notes"]
    assert facts(tmp_path, np.zeros((5, 9)))["looks_like"] == "constant rows"


@pytest.mark.parametrize("shape", [(0, 5), (0,), (5,), (1, 1), (3, 4, 5), (1, 7)])
def test_odd_shapes(shape, tmp_path):
    found = facts(tmp_path, np.linspace(-1, 1, math.prod(shape)).reshape(shape))
    assert found["shape"] == list(shape)
    assert found["rows"] == math.prod(shape[:-1] if len(shape) > 1 else shape)
    assert ("estimate" in found) == (len(shape) > 1 and 0 not in shape)
    json.dumps(found, allow_nan=False)
    assert shown(found, 80)


# ---- the sample ----


@pytest.mark.parametrize(
    ("total", "row_bytes", "chunk"),
    [
        (10**9, 512_000, 1),
        (10**6, 1000, 1),
        (10**9, 512_000, 256),
        (70_000, 10_000, 64),
        (300, 10**6, 1),
        (65, 10**6, 1),
    ],
)
def test_the_sample_is_spread_over_all_rows(total, row_bytes, chunk):
    found = list(sampling.runs(total, row_bytes, 64 * 2**20, chunk))
    assert found == list(sampling.runs(total, row_bytes, 64 * 2**20, chunk))
    assert (found[0].start, found[-1].stop) == (0, total)
    assert all(a.stop <= b.start for a, b in itertools.pairwise(found))  # in order, no row twice
    seen = sum(map(len, found))
    assert 0.4 * 64 * 2**20 <= seen * row_bytes <= 64 * 2**20
    gaps = [b.start - a.start for a, b in itertools.pairwise(found)]
    assert max(gaps) <= 1.5 * total / (len(found) - 1) + chunk
    if chunk > 1:
        assert all(run.start % chunk == 0 and (len(run) < chunk or len(run) % chunk == 0) for run in found[:-1])


def test_few_places_where_chunks_are_large():
    """Each place costs the whole chunk."""
    assert len(list(sampling.runs(10**9, 512_000, 64 * 2**20, chunk=500))) == 3
    assert len(list(sampling.runs(10**9, 512_000, 64 * 2**20, chunk=10**6))) == 3


@pytest.mark.parametrize("total", [1, 5, 1000, 67])
def test_all_rows_where_they_fit(total):
    found = list(sampling.runs(total, 1000, 10**6))
    assert [row for run in found for row in run] == list(range(total))


@pytest.mark.parametrize(("dtype", "shape"), [("<f4", (2**24, 1000)), ("<i8", (2**33,))], ids=["logits", "labels"])
def test_a_huge_file_takes_little_memory(dtype, shape, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "INTEGER_BYTES", 64 * 2**20)
    with (tmp_path / "huge.npy").open("wb") as file:  # 64 GB of holes
        np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + 2**26 * 1000 if dtype == "<f4" else file.tell() + 2**36)
    tracemalloc.start()
    try:
        found = inspect.facts(str(tmp_path / "huge.npy"))
        assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    finally:
        tracemalloc.stop()
    assert found["sample"]["bytes"] <= 64 * 2**20
    assert found["bytes"] > 60 * 10**9


# ---- integers ----


@pytest.mark.parametrize(
    ("values", "looks_like", "ignored", "negative", "least", "greatest"),
    [
        ([5, 3, -100, 7, -100], "labels", 2, 0, 3, 7),
        ([5, 3, -1, 7, -100], "labels", 1, 1, -1, 7),
        ([0, 0, 1, 1, 4], "document ids", 0, 0, 0, 4),
        ([3, 1, 2], "labels", 0, 0, 1, 3),
        ([-100, 1, 2, 9], "labels", 1, 0, 1, 9),
        ([-100, -100], "labels", 2, 0, None, None),
        ([6, 6, 6], "labels or document ids", 0, 0, 6, 6),
    ],
)
def test_integers(values, looks_like, ignored, negative, least, greatest, tmp_path):
    found = facts(tmp_path, np.array(values))
    seen = found["sample"]
    assert (found["looks_like"], seen["ignored"], seen["negative"]) == (looks_like, ignored, negative)
    assert (seen["least"], seen["greatest"]) == (least, greatest)


def test_order_is_seen_across_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "RUNS", 4)
    monkeypatch.setattr(sampling, "INTEGER_BYTES", 4 * 40)
    falling = np.repeat(np.arange(3, -1, -1), 10).astype(np.int32)  # level within each run
    assert facts(tmp_path, falling)["looks_like"] == "labels"
    assert facts(tmp_path, falling[::-1].copy())["looks_like"] == "document ids"


def test_unsigned_labels_have_no_ignored_ones(tmp_path):
    seen = facts(tmp_path, np.array([156, 3, 255], np.uint8))["sample"]  # 156 is -100 modulo 256
    assert (seen["ignored"], seen["negative"], seen["greatest"]) == (0, 0, 255)
    large = facts(tmp_path, np.array([2**64 - 100, 3], np.uint64))["sample"]
    assert (large["ignored"], large["greatest"]) == (0, 2**64 - 100)


def test_masks(tmp_path):
    assert facts(tmp_path, np.array([True, False]))["looks_like"] == "a mask"


# ---- labels beside logits ----


def labelled(tmp_path, labels, shape=(60, V), **options):
    x = np.zeros(shape, np.float32)
    x[..., 0] = 1
    return facts(tmp_path, x, labels=save(tmp_path / "labels.npy", np.asarray(labels)), **options)["labels"]


def test_labels_that_fit(tmp_path):
    y = np.arange(60) % V
    y[::6] = -100
    found = labelled(tmp_path, y)
    assert (found["problem"], found["sample"]["outside"], found["sample"]["ignored"]) == (None, 0, 10)
    assert labelled(tmp_path, y.reshape(4, 15), (4, 15, V))["problem"] is None
    assert labelled(tmp_path, np.where(y < 0, 7, y).astype(np.uint8))["problem"] is None
    assert labelled(tmp_path, np.where(y < 0, V, y), ignore_index=V)["problem"] is None


@pytest.mark.parametrize("bad", [V, -1, 2**32 + 1, -101])
def test_the_first_label_outside_is_named(bad, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "INTEGER_BYTES", 60 * 8)
    y = np.zeros(60, np.int64)
    y[[41, 50]] = bad
    found = labelled(tmp_path, y)
    assert (found["sample"]["outside"], found["first_outside"]) == (2, (41, bad))
    assert f"label {bad} at row 41 of" in found["problem"]
    assert "is outside the vocabulary of 400 classes and not -100" in found["problem"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(59, int), r"must have shape (60,) for logits of shape (60, 400), got (59,)"),
        (np.zeros((60, 1), int), r"must have shape (60,) for logits of shape (60, 400), got (60, 1)"),
        (np.zeros(60), "must be integers, got float64"),
        (np.zeros(60, bool), "must be integers, got bool"),
        (np.full(60, -100), "are -100: there is nothing to score"),
    ],
)
def test_labels_that_do_not_fit(labels, message, tmp_path):
    assert message in labelled(tmp_path, labels)["problem"]


def test_what_was_not_read_is_not_vouched_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "INTEGER_BYTES", 30 * 8)
    x = save(tmp_path / "x.npy", np.zeros((60, V), np.float32))
    found = inspect.facts(x, labels=save(tmp_path / "y.npy", np.arange(60)))
    assert "each of 16 labels looked at is in the vocabulary" in shown(found, 200)


def test_labels_of_no_logits(tmp_path):
    y = save(tmp_path / "y.npy", np.arange(5))
    assert "holds no logits (..., vocab)" in inspect.facts(y, labels=y)["labels"]["problem"]


# ---- storage ----


def test_storage(tmp_path):
    x = np.random.default_rng(0).normal(0, 1, (48, V)).astype(np.float32)
    made = zarr.create_array(
        str(tmp_path / "x.zarr"), shape=x.shape, dtype="f4", chunks=(4, V), shards=(16, V), compressors=None
    )
    made[:32] = x[:32]
    found = inspect.facts(str(tmp_path / "x.zarr"))
    assert (found["rows"], found["vocab"], found["bytes_per_row"]) == (48, V, 4 * V)
    assert (found["bytes"], found["files"], found["format"]) == (48 * 4 * V, 3, "Zarr")
    on_disk = sum(path.stat().st_size for path in (tmp_path / "x.zarr").rglob("*") if path.is_file())
    assert found["stored_bytes"] == on_disk
    assert found["rows_per_chunk"] % 4 == 0
    assert "1 chunks are not stored" in found["warnings"][0]
    assert "1 chunks are not stored" in shown(found, 300)
    assert "16 of 48 sampled rows have one value only" in shown(found, 300)


def test_what_scoring_takes(tmp_path):
    found = facts(tmp_path, np.random.default_rng(0).normal(0, 1, (20, 30, V)).astype(np.float16))
    cost = found["estimate"]
    assert cost["seconds"] * cost["bytes_per_second"] == pytest.approx(600 * V * 2)
    assert cost["block_rows"] == 600  # all of it fits into a block
    assert cost["memory_bytes"] == cost["blocks_in_memory"] * 600 * V * 2
    assert cost["read_bytes_per_second"] > 0


@pytest.mark.parametrize(("rows", "threads"), [(1, 2), (5, 1), (1000, 2), (10**6, 2), (10**6, 64)])
def test_the_timed_blocks_are_few_and_spread(rows, threads, monkeypatch):
    monkeypatch.setattr(inspect, "thread_count", lambda: threads)
    array = np.broadcast_to(np.float32(0), (rows, 1000))
    job = inspect.Job(inspect.ArraySource(array), inspect.ArraySource(np.zeros(1, int)))
    blocks = inspect._timed_blocks(job, 8388)
    assert all(0 <= a.start < a.stop <= b.start for a, b in itertools.pairwise(blocks))
    assert 0 < len(blocks) <= 2 * threads
    assert blocks[-1].stop <= rows
    assert sum(map(len, blocks)) * 4000 <= 128 * 2**20
    if rows >= 2 * threads:
        assert len(blocks) == 2 * threads


@pytest.mark.parametrize("suffix", [".h5", ".safetensors", ".parquet"])
def test_members_are_listed(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    save(path, np.ones((6, V), np.float32), name="deep.logits")
    found = inspect.facts(str(path))
    listed = {member["name"]: member for member in found["members"]}
    assert set(listed) == {f"{path}::deep.logits", f"{path}::other"}
    logits = listed[f"{path}::deep.logits"]
    assert (logits["shape"], logits["dtype"], logits["bytes"]) == ([6, V], "float32", 6 * V * 4)
    text = shown(found, 300)
    assert f"Name one of them: gpuxent inspect {path}::deep.logits" in text  # the largest
    assert "(6, 400)" in text
    with pytest.raises(ValueError, match="has 2 arrays; name that of the logits"):
        inspect.facts(str(path), labels=str(path))
    assert inspect.facts(f"{path}::deep.logits")["shape"] == [6, V]


def test_members_of_groups_and_what_is_no_array(tmp_path):
    group = zarr.create_group(str(tmp_path / "x.zarr"))
    group.create_array("logits", shape=(6, V), dtype="f4")
    group.create_array("labels", shape=(6,), dtype="i4")
    names = [member["name"] for member in inspect.facts(str(tmp_path / "x.zarr"))["members"]]
    assert sorted(names) == [f"{tmp_path}/x.zarr::labels", f"{tmp_path}/x.zarr::logits"]
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["text"], file["y"] = "some text", np.arange(5)
    found = inspect.facts(f"{tmp_path}/x.h5")
    assert ["problem" in member for member in found["members"]] == [True, False]
    assert "cannot be read" in shown(found, 100)


# ---- the command ----


def shown(found, width):
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(inspect.to_table(found))
    return capture.get()


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_table_fits_the_terminal(width, tmp_path):
    x = made("in [0, 1]").astype(np.float32)
    x[3, 5] = np.nan
    found = facts(tmp_path, x, labels=save(tmp_path / "y.npy", np.zeros(60, int)))
    found["name"] = "x.npy"
    text = shown(found, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    words = " ".join(text.replace("│", " ").split())
    for expected in (
        "(60, 400)",
        "float32",
        "93.8 KiB",
        "1 of 24,000 (0.00417 %)",
        "the values do not tell",
        "2 threads",
    ):
        assert expected.replace("2 threads", "thread") in words
    assert "The labels fit" in words


def test_shares_are_never_rounded_to_none():
    assert inspect.share(0, 10) == "none"
    assert inspect.share(1, 10**9) == "1 of 1,000,000,000 (1e-07 %)"
    assert inspect.share(5, 5) == "5 of 5 (all)"


def test_command(tmp_path):
    x = save(tmp_path / "x.npy", made("logits").astype(np.float32))
    y = save(tmp_path / "y.npy", np.arange(60))
    done = gpuxent("inspect", x, "--labels", y)
    assert (done.returncode, done.stderr) == (0, "")
    assert "The labels fit" in done.stdout
    np.save(y, np.arange(60) + V - 59)
    done = invoked("inspect", x, "--labels", y, "--format", "json")
    assert done.exit_code == 3
    assert done.stderr == f"gpuxent: label 400 at row 59 of {y} is outside the vocabulary of 400 classes and not -100\n"
    assert json.loads(done.stdout)["labels"]["first_outside"] == [59, 400]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Missing argument 'PATH'"),
        (["none.npy"], 3, "none.npy does not exist"),
        (["text.npy"], 3, "is not a whole .npy file"),
    ],
)
def test_exit_codes(arguments, code, message, tmp_path):
    (tmp_path / "text.npy").write_text("no array")
    done = invoked("inspect", *(tmp_path / a for a in arguments))
    assert (done.exit_code, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    if code == 3:
        assert done.stderr.count("\n") == 1
