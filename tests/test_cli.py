"""The command line as a process: results, exit codes, and what is said about bad input."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import oracle
import pytest
import zarr
from makers import labels, logits
from test_sources import save_npy, save_zarr
from typer.testing import CliRunner

import gpuxent as gx
from gpuxent.cli import app
from gpuxent.cli._console import check_writable

BUILT_IN = "import sys; from gpuxent.cli import main; main()"
COUNTED = {"scored", "ignored", "accuracy", "top5_accuracy"}
FLOAT32_EPS = float(np.finfo(np.float32).eps)
OF_THE_TERMINAL = {"COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}  # rich looks at these
FULL = Path("/dev/full")


def gpuxent(*arguments, stdout=subprocess.PIPE, **environment):
    command = [sys.executable, "-c", BUILT_IN, *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k not in OF_THE_TERMINAL} | environment
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, timeout=120)


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def perplexity(*arguments):
    done = gpuxent("perplexity", *arguments, "--format", "json")
    assert done.returncode == 0, done.stderr
    result = strict_json(done.stdout)
    result["run"].pop("logits"), result["run"].pop("labels")  # so that two files may be compared
    return result


class Data:
    """Files of logits, labels and document ids, and the arrays in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.x = logits(400, 150, np.float32, seed=1, kinds=("ordinary", "peak", "tie of two", "near zero", "masked"))
        self.y = labels(self.x)
        self.ids = np.arange(400) // 60
        self.logits = save_npy(folder / "logits.npy", self.x)
        self.labels = save_npy(folder / "labels.npy", self.y)
        self.documents = save_npy(folder / "ids.npy", self.ids)

    def save(self, name, array):
        return save_npy(self.folder / name, array)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def expected(data):
    on = data.y >= 0
    losses = np.asarray(oracle.row_losses(data.x, data.y)[0])[on]
    ranks = oracle.label_ranks(data.x, data.y)[on]
    confidence = np.asarray(oracle.p_max_rows(data.x), np.float64)[on]
    return {
        "cross_entropy": losses.mean(),
        "perplexity": np.exp(losses.mean()),
        "bits_per_token": losses.mean() / np.log(np.longdouble(2)),
        "stderr_iid": losses.std(ddof=1) / np.sqrt(losses.size),
        "scored": on.sum(),
        "ignored": (~on).sum(),
        "accuracy": (ranks == 0).mean(),
        "top5_accuracy": (ranks < 5).mean(),
        "entropy": oracle.entropy(data.x)[on].mean(),
        "ece": oracle.ece(confidence, ranks == 0, 15),
    }


def test_results(data, expected):
    result = perplexity(data.logits, "--labels", data.labels)
    eps = dict.fromkeys(expected, 4) | {"perplexity": 4 * math.ceil(expected["cross_entropy"])}  # d exp(x) = exp(x) dx
    eps |= dict.fromkeys(COUNTED, 0)
    for name, value in expected.items():
        assert result[name] == pytest.approx(float(value), rel=eps[name] * FLOAT32_EPS, abs=0), name
    assert sum(b["count"] for b in result["bins"]) == result["scored"]
    assert (result["nan_rows"], result["first_nan_row"]) == (result["infinite_rows"], result["first_infinite_row"])
    assert (result["nan_rows"], result["first_nan_row"]) == (0, None)


def test_zarr_and_three_axes_give_the_same(data, tmp_path):
    expected = perplexity(data.logits, "--labels", data.labels)
    x = save_zarr(tmp_path / "x.zarr", data.x, (64, 100))
    y = save_zarr(tmp_path / "y.zarr", data.y, (50,))
    assert perplexity(x, "--labels", y) == expected
    x = save_zarr(tmp_path / "x3.zarr", data.x.reshape(8, 50, 150), (3, 20, 150))
    y = save_npy(tmp_path / "y3.npy", data.y.reshape(8, 50))
    found = perplexity(x, "--labels", y)
    assert max(p["last"] for p in found.pop("by_position")) == 63 < max(p["last"] for p in expected.pop("by_position"))
    assert (found.pop("run")["shape"], expected.pop("run")["shape"]) == ([8, 50, 150], [400, 150])
    assert found == expected


def test_sixteen_bits(data, tmp_path):
    for dtype in (np.float16, ml_dtypes.bfloat16):
        x = data.x.astype(dtype)
        result = perplexity(save_npy(tmp_path / "x.npy", x), "--labels", data.labels)
        losses = oracle.cross_entropy(x, data.y)
        assert result["cross_entropy"] == pytest.approx(float(losses), rel=1e-6)
        folder = tmp_path / f"{np.dtype(dtype).name}.zarr"
        assert perplexity(save_zarr(folder, x), "--labels", data.labels) == result


def test_temperature_and_ignore_index(data):
    result = perplexity(data.logits, "--labels", data.labels, "--temperature", "2")
    assert result["cross_entropy"] == pytest.approx(
        float(oracle.cross_entropy(data.x, data.y, temperature=2.0)), rel=1e-6
    )
    y = np.where(data.y == -100, 7, data.y)
    other = data.save("labels7.npy", y)
    result = perplexity(data.logits, "--labels", other, "--ignore-index", "7")
    assert result["cross_entropy"] == pytest.approx(float(oracle.cross_entropy(data.x, y, ignore_index=7)), rel=1e-6)


def test_documents(data):
    result = perplexity(data.logits, "--labels", data.labels, "--documents", data.documents)
    losses = np.asarray(oracle.row_losses(data.x, data.y)[0], np.float64)
    assert result["documents"] == 7
    assert [d["document"] for d in result["by_document"]] == list(range(7))
    means = []
    for d in result["by_document"]:
        on = (data.ids == d["document"]) & (data.y >= 0)
        assert d["scored"] == on.sum()
        means.append(losses[on].mean())
        assert d["cross_entropy"] == pytest.approx(means[-1], rel=1e-6)
    assert result["document_cross_entropy"] == pytest.approx(np.mean(means), rel=1e-6)


def test_table_on_stdout_progress_on_stderr(data):
    done = gpuxent("perplexity", data.logits, "--labels", data.labels, "--documents", data.documents)
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    for text in ("scored ", "cross-entropy", "perplexity", "top-5 accuracy", "ECE", "Documents"):
        assert text in done.stdout
    assert "/400 rows" not in done.stdout
    assert re.search(r"^6 +\d+ ", done.stdout, re.MULTILINE)  # each of the seven documents
    assert done.stderr.splitlines()[-1].startswith("gpuxent: 400/400 rows (100%), cross-entropy ")
    assert "\x1b" not in done.stdout + done.stderr


def test_the_table_has_the_numbers_of_the_json(data, expected):
    lines = gpuxent("perplexity", data.logits, "--labels", data.labels).stdout.splitlines()
    cells = {row[0]: row[1:] for row in (re.split(r"  +", line.strip()) for line in lines)}
    result = {name: float(value) for name, value in expected.items()}
    assert lines[0] == (
        f"scored {expected['scored']:,}  ignored {expected['ignored']:,}  bad 0  from logits/float32  shift 0"
    )
    error = result["stderr_iid"]
    assert cells["cross-entropy"] == [f"{result['cross_entropy']:.6g} nat", f"{error:.2g}"]
    assert cells["perplexity"] == [f"{result['perplexity']:,.6g}", f"{round(result['perplexity'] * error, -1):,.0f}"]
    assert cells["bits per token"] == [f"{result['bits_per_token']:.6g}", f"{error / math.log(2):.2g}"]
    assert cells["accuracy"][0] == f"{100 * result['accuracy']:.2f} %"
    assert cells["top-5 accuracy"][0] == f"{100 * result['top5_accuracy']:.2f} %"
    assert cells["entropy of the model"][0] == f"{result['entropy']:.6g} nat"
    assert cells["calibration error (ECE, 15 bins)"][0] == f"{result['ece']:.6g}"


def test_a_terminal_that_knows_ascii_alone_gets_the_table_too(data):
    done = gpuxent("perplexity", data.logits, "--labels", data.labels, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert "cross-entropy" in done.stdout


def test_a_reader_that_has_seen_enough_is_no_error_to_talk_about(data):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        done = gpuxent("perplexity", data.logits, "--labels", data.labels, "--format", "json", stdout=closed)
    assert done.stderr.splitlines()[1:] == []


@pytest.mark.parametrize("form", ["json", "table"])
def test_output_goes_to_the_file(data, tmp_path, form):
    file = tmp_path / "result"
    done = gpuxent("perplexity", data.logits, "--labels", data.labels, "--format", form, "--output", file)
    assert (done.returncode, done.stdout) == (0, "")
    text = file.read_text(encoding="utf-8")
    assert strict_json(text)["scored"] > 0 if form == "json" else "cross-entropy" in text
    assert text == gpuxent("perplexity", data.logits, "--labels", data.labels, "--format", form).stdout


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("form", ["json", "table"])
def test_a_full_disk_is_said_in_one_line(data, form):
    arguments = ("perplexity", data.logits, "--labels", data.labels, "--format", form)
    with FULL.open("w") as full:
        done = [gpuxent(*arguments, "--output", FULL), gpuxent(*arguments, stdout=full, PYTHONUNBUFFERED="")]
    assert [d.returncode for d in done] == [3, 3]
    assert done[0].stderr.splitlines()[1:] == ["gpuxent: /dev/full cannot be written: No space left on device"]
    assert done[1].stderr.splitlines()[1:] == ["gpuxent: stdout cannot be written: No space left on device"]


def test_inputs_are_never_written_over(data):
    for file in (data.logits, data.labels, data.documents):
        before = file.read_bytes()
        done = gpuxent(
            "perplexity", data.logits, "--labels", data.labels, "--documents", data.documents, "--output", file
        )
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr == f"gpuxent: --output must not be one of the inputs, got {file}\n"
        assert file.read_bytes() == before


def test_a_forbidden_output_is_found_out_before_the_work(monkeypatch, tmp_path):
    """Not as a process: root, as which tests may run, may write anywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"--output must be a file that may be written, got .*result"):
        check_writable(tmp_path / "result")


def test_infinite_and_nan_rows_are_counted(data):
    x, y = data.x.copy(), data.y.copy()
    x[41, 3], y[41] = -np.inf, 3
    result = perplexity(data.save("inf.npy", x), "--labels", data.save("inf_labels.npy", y))
    assert (result["cross_entropy"], result["infinite_rows"], result["first_infinite_row"]) == (None, 1, 41)
    x[[77, 200]] = np.nan
    y[[77, 200]] = 0
    files = (data.save("nan.npy", x), "--labels", data.save("nan_labels.npy", y))
    done = gpuxent("perplexity", *files)
    assert done.returncode == 0
    assert "2 rows have a loss of NaN, first row 77" in done.stdout
    assert "1 row has an infinite loss, first row 41" in done.stdout
    result = perplexity(*files, "--documents", data.documents)
    assert [result[name] for name in ("cross_entropy", "perplexity", "stderr_iid", "entropy", "ece")] == [None] * 5
    assert [result[name] for name in ("nan_rows", "first_nan_row")] == [2, 77]
    assert [result[name] for name in ("infinite_rows", "first_infinite_row")] == [1, 41]
    means = [d["cross_entropy"] for d in result["by_document"]]
    assert [i for i, mean in enumerate(means) if mean is None] == [0, 1, 3]
    assert result["document_cross_entropy"] is None


def test_documents_with_nan_are_the_worst(data):
    x, y = data.x.copy(), data.y.copy()
    x[[77, 200]], y[[77, 200]] = np.nan, 0
    ids = data.save("many_ids.npy", np.arange(400) // 25)
    files = (data.save("worst.npy", x), "--labels", data.save("worst_labels.npy", y), "--documents", ids)
    losses = np.asarray(oracle.row_losses(x, y)[0])
    means = np.array([losses[i : i + 25].sum() / (y[i : i + 25] >= 0).sum() for i in range(0, 400, 25)])
    order = np.argsort(means)  # NaN last
    best, worst = gpuxent("perplexity", *files).stdout.split("Best documents")[1].split("Worst documents")
    shown = [[int(row) for row in re.findall(r"^(\d+) ", part, re.MULTILINE)] for part in (best, worst)]
    assert shown[0] == order[:5].tolist()
    assert sorted(shown[1][:2]) == [3, 8]
    assert shown[1][2:] == order[::-1][2:5].tolist()


def test_usage_errors_exit_with_2(data):
    for arguments in (
        ("perplexity", data.logits),
        ("perplexity", data.logits, "--labels", data.labels, "--colour"),
        ("perplexity", data.logits, "--labels", data.labels, "--format", "xml"),
        ("perplexity", data.logits, "--labels", data.labels, "--temperature", "hot"),
        ("perplexxity",),
    ):
        done = gpuxent(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert "Traceback" not in done.stderr
    assert "--labels" in gpuxent("perplexity", data.logits).stderr


def bad_inputs(data):
    """(what is said, logits, labels, more arguments)."""
    x, y = data.x, data.y
    raw = data.logits.read_bytes()
    (data.folder / "cut.npy").write_bytes(raw[: len(raw) // 2])
    (data.folder / "empty.npy").write_bytes(b"")
    (data.folder / "text.npy").write_text("not an array")
    (data.folder / "folder").mkdir()
    np.savez(data.folder / "many.npz", x=x)
    np.save(data.folder / "objects.npy", np.array([{}], object), allow_pickle=True)
    out_of_range = y.copy()
    out_of_range[333] = 150
    chunk = save_zarr(data.folder / "broken.zarr", x, (100, 150)) / "c/1/0"
    chunk.write_bytes(chunk.read_bytes()[:-100])
    path = data.folder.joinpath
    good = (data.logits, data.labels)
    yield "gone.npy does not exist", path("gone.npy"), data.labels, ()
    yield "two lines.npy does not exist", path("two\nlines.npy"), data.labels, ()
    yield "gone.npy does not exist", data.logits, path("gone.npy"), ()
    yield "gone.npy does not exist", data.logits, data.labels, ("--documents", path("gone.npy"))
    yield "cut.npy is not a whole .npy file", path("cut.npy"), data.labels, ()
    yield "empty.npy is not a whole .npy file", path("empty.npy"), data.labels, ()
    yield "text.npy is not a whole .npy file", path("text.npy"), data.labels, ()
    yield "objects.npy is not a whole .npy file", path("objects.npy"), data.labels, ()
    yield "objects.npy is not a whole .npy file", data.logits, path("objects.npy"), ()
    yield "broken.zarr", path("broken.zarr"), data.labels, ()
    yield "folder", path("folder"), data.labels, ()
    yield "many.npz is an archive of arrays", path("many.npz"), data.labels, ()
    yield (
        "must have shape (400,) for logits of shape (400, 150), got (399,)",
        data.logits,
        data.save("y1.npy", y[1:]),
        (),
    )
    yield "must have shape (rows, vocab) or (..., vocab), got (150,)", data.save("x1.npy", x[0]), data.labels, ()
    yield "yf.npy) must be integers, got float64", data.logits, data.save("yf.npy", y * 1.0), ()
    yield "yf.npy) must be integers, got float64", data.logits, data.labels, ("--documents", path("yf.npy"))
    yield "y1.npy) must have shape (400,)", data.logits, data.labels, ("--documents", path("y1.npy"))
    yield (
        "must be float16, bfloat16, float32 or float64, got int32",
        data.save("xi.npy", np.zeros((400, 150), np.int32)),
        data.labels,
        (),
    )
    yield "labels[333] is 150, expected a class in [0, 150)", data.logits, data.save("yr.npy", out_of_range), ()
    yield "no token to score", data.logits, data.save("yn.npy", np.full(400, -100)), ()
    yield "no token to score", data.save("x0.npy", x[:0]), data.save("y0.npy", y[:0]), ()
    yield "got (400, 0)", data.save("xv.npy", x[:, :0]), data.labels, ()
    for value, said in (("0", "0.0"), ("-1", "-1.0"), ("nan", "nan"), ("inf", "inf")):
        yield f"--temperature must be a number above 0, got {said}", *good, ("--temperature", value)
    yield "--output must be a file in an existing folder", *good, ("--output", path("no/r.json"))
    yield "--output must be a file in an existing folder", *good, ("--output", path("folder"))


def test_bad_input_exits_with_3_and_one_line(data):
    """In this process: thirty others would only start, for a second each."""
    for message, x, y, more in bad_inputs(data):
        done = CliRunner().invoke(app, ["perplexity", *map(str, (x, "--labels", y, *more))])
        assert (done.exit_code, done.stdout) == (3, ""), message
        *progress, line = done.stderr.splitlines()
        assert line.startswith("gpuxent: "), done.stderr
        assert message in line
        assert all(text.startswith("gpuxent: ") and "rows" in text for text in progress), done.stderr
        assert "pickle" not in line  # NumPy's advice to load unsafely is no advice


def test_a_bad_label_is_named_by_its_row_also_in_a_later_block(tmp_path):
    rows, vocab = 3000, 2**14
    with (tmp_path / "x.npy").open("wb") as file:  # holes: all zeros, three blocks
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": (rows, vocab)})
        file.truncate(file.tell() + rows * vocab * 2)
    y = np.zeros(rows, np.int64)
    y[[2345, 2999]] = vocab
    done = gpuxent("perplexity", tmp_path / "x.npy", "--labels", save_npy(tmp_path / "y.npy", y))
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.splitlines()[-1].startswith(f"gpuxent: labels[2345] is {vocab}, expected a class in [0, {vocab}")


def test_info_version_and_help():
    done = gpuxent("info")
    assert done.returncode == 0
    assert "backend numpy" in done.stdout
    assert np.__version__ in done.stdout
    assert gpuxent("--version").stdout.startswith("gpuxent 0.")
    for arguments in (("--help",), ("perplexity", "--help")):
        assert gpuxent(*arguments).returncode == 0
    assert "perplexity" in gpuxent("--help").stdout


def test_without_a_command_there_is_help():
    done = gpuxent()
    assert done.returncode == 2
    assert "Usage: " in done.stdout + done.stderr
    assert "perplexity" in done.stdout + done.stderr


def test_perplexity_that_overflows(data, tmp_path):
    x = save_npy(tmp_path / "x.npy", np.array([[0.0, 2000.0]]))
    result = perplexity(x, "--labels", save_npy(tmp_path / "y.npy", np.array([0])))
    assert (result["perplexity"], result["cross_entropy"]) == (None, 2000.0)
    assert math.isclose(result["bits_per_token"], 2000 / math.log(2))


def test_json_says_what_was_scored(data):
    done = gpuxent("perplexity", data.logits, "--labels", data.labels, "--temperature", "2", "--format", "json")
    assert strict_json(done.stdout)["run"] == {
        "gpuxent": gx.__version__,
        "logits": str(data.logits),
        "labels": str(data.labels),
        "documents": None,
        "mask": None,
        "source": "logits/float32",
        "shape": [400, 150],
        "shift": 0,
        "min_context": 0,
        "limit": None,
        "topk": [1, 5],
        "bins": 15,
        "ignore_index": -100,
        "softcap": None,
        "temperature": 2.0,
        "backend": None,
    }


def test_chunks_that_are_not_stored_are_warned_of(data, tmp_path):
    made = zarr.create_array(str(tmp_path / "half.zarr"), shape=(400, 150), chunks=(100, 150), dtype="f4")
    made[:200] = data.x[:200]
    done = gpuxent("perplexity", tmp_path / "half.zarr", "--labels", data.labels)
    assert done.returncode == 0
    assert "half.zarr: 2 chunks are not stored and read as the fill value" in done.stderr.splitlines()[0]
