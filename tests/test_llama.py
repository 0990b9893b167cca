"""llama.cpp's `.kld` files, written and read, and its statistics, against code that shares nothing with gpuxent's."""

import json
import math
import shutil

import llama
import ml_dtypes
import numpy as np
import pytest
from rich.console import Console
from test_convert import names
from typer.testing import CliRunner

import gpuxent as gx
from gpuxent import calibration
from gpuxent.cli import app
from gpuxent.evaluation.comparison.kept import comparison_of_run, read_pair_tokens
from gpuxent.evaluation.files import kld
from gpuxent.evaluation.files.convert import convert
from gpuxent.evaluation.sources import open_source

FLOAT32 = 5e-6  # log-probabilities of -30 and less, as they are decoded
QUANTILES = (0.999, 0.99, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01, 0.001)


@pytest.fixture
def quiet():
    return Console(quiet=True)


def models(windows, n_ctx, vocab, spread=3.0, seed=0):
    """Logits (windows, scored, vocab) of a model and of one that is close to it, and tokens (windows, n_ctx), likely
    ones, but for a few that were cut off."""
    rng = np.random.default_rng(seed)
    scored = n_ctx - 1 - n_ctx // 2
    base = rng.normal(0, spread, (windows, scored, vocab)).astype(np.float32)
    other = base + rng.normal(0, 0.1, base.shape).astype(np.float32)
    tokens = rng.integers(0, vocab, (windows, n_ctx))
    likely = np.argsort(base, axis=2)[:, :, -1 - rng.integers(0, min(4, vocab))]
    tokens[:, n_ctx // 2 + 1 :] = np.where(rng.random(likely.shape) < 0.1, base.argmin(axis=2), likely)
    return base, other, tokens


def flat(logits):
    return logits.reshape(-1, logits.shape[-1])


# ---- the statistics ----


@pytest.mark.parametrize(("vocab", "spread"), [(60, 2.0), (60, 9.0), (3001, 6.0)])
def test_what_llama_prints_from_its_file(vocab, spread, tmp_path):
    """With rows of which nothing is cut off, and rows of which much is. The log-probabilities that are left, 16 bits
    each, do not sum to 1: by what is missing or too much (`gap`) the terms of the divergence differ, llama.cpp's being
    those that can be negative."""
    base, other, tokens = models(6, 32, vocab, spread)
    path = llama.write(tmp_path / "base.kld", base, tokens)
    expected = llama.Statistics(path, flat(other))
    found = gx.compare(path, flat(other), f"{path}::labels", documents=f"{path}::contexts", run=tmp_path / "run")
    shown = expected.shown()
    assert (found.scored, found.documents, found.bad) == (6 * 15, 6, 0)
    for name in ("other_perplexity", "base_perplexity", "log_ratio", "ratio", "difference", "delta_p", "delta_p_rms"):
        value, uncertainty = shown[name]
        scale = shown["base_perplexity"][0] if name == "difference" else 1.0
        assert getattr(found, name).value == pytest.approx(value, rel=2e-6, abs=5e-7 * scale), name
        assert getattr(found, name).stderr_iid == pytest.approx(uncertainty, rel=2e-5), name
    assert found.correlation == pytest.approx(shown["correlation"][0], abs=1e-6)
    assert (found.same_top.value, found.same_top.stderr_iid) == pytest.approx(shown["same_top"], rel=1e-12)
    gaps = expected.gaps()
    assert max(map(abs, gaps)) < 2e-3
    exact = [kld + gap for kld, gap in zip(expected.kld, gaps, strict=True)]
    tokens_kept = list(read_pair_tokens(tmp_path / "run"))
    assert np.concatenate([part.kl for part in tokens_kept]) == pytest.approx(exact, rel=1e-4, abs=FLOAT32)
    assert found.kl.value == pytest.approx(shown["kl"][0], abs=abs(math.fsum(gaps)) / len(gaps) + FLOAT32)
    kept = comparison_of_run(tmp_path / "run")
    for level in QUANTILES:
        assert kept.kl_quantiles[level] == pytest.approx(expected.percentile(exact, level), rel=1e-4, abs=FLOAT32)
        assert kept.kl_quantiles[level] == pytest.approx(expected.percentile(expected.kld, level), abs=2e-3)
        assert kept.delta_p_quantiles[level] == pytest.approx(expected.percentile(expected.p_diff, level), abs=1e-6)
    assert kept.kl_quantiles[1.0] == pytest.approx(max(exact), rel=1e-4)
    assert kept.kl_quantiles[0.0] == pytest.approx(min(exact), rel=1e-4, abs=FLOAT32)
    assert kept.kl_quantiles[0.0] >= 0
    assert min(kept.delta_p_quantiles.values()) == pytest.approx(min(expected.p_diff), abs=1e-6)


def test_perplexity_of_its_file_is_what_llama_prints(tmp_path):
    base, other, tokens = models(4, 16, 500, 6.0)
    path = llama.write(tmp_path / "base.kld", base, tokens)
    expected = llama.Statistics(path, flat(other))
    found = gx.evaluate(path, f"{path}::labels")
    assert found.cross_entropy == pytest.approx(expected.mean(expected.nll_base)[0], rel=1e-6)
    assert found.stderr_iid == pytest.approx(expected.mean(expected.nll_base)[1], rel=1e-5)
    shards = [shutil.copy(path, tmp_path / "shards" / name) for name in _made(tmp_path / "shards", "a.kld", "b.kld")]
    both = gx.evaluate(tmp_path / "shards", f"{tmp_path}/shards::labels")
    assert (len(shards), both.cross_entropy) == (2, found.cross_entropy)
    checked = calibration.reliability(path, f"{path}::labels", resamples=20)
    assert checked.nll.value == pytest.approx(found.cross_entropy, rel=1e-12)
    truth = gx.evaluate(flat(base), tokens[:, 9:].ravel())
    assert found.entropy == pytest.approx(truth.entropy, abs=2e-3)
    assert found.accuracy == truth.accuracy


def _made(folder, *names):
    folder.mkdir()
    return names


@pytest.mark.parametrize("sides", ["base", "other", "both"])
def test_divergences_of_what_is_cut_off_are_those_of_the_logits(sides, tmp_path):
    """Of 20,000 classes nearly all are cut off: with the numbers that the file has for them, KL would be ten times what
    it is."""
    base, other, tokens = models(2, 9, 20_000, 2.5)
    rng = np.random.default_rng(1)
    for logits in (base, other):
        places = np.random.default_rng(7).integers(0, 20_000, (2, 4, 30))
        np.put_along_axis(logits, places, np.sort(rng.normal(22, 2, places.shape), axis=2).astype(np.float32), axis=2)
    tokens[:, 5:] = places[:, :, -1]
    files = [llama.write(tmp_path / f"{n}.kld", x, tokens) for n, x in (("base", base), ("other", other))]
    given = [
        str(file) if sides in (name, "both") else flat(logits)
        for name, file, logits in zip(("base", "other"), files, (base, other), strict=True)
    ]
    labels = tokens[:, 5:].ravel()
    found, truth = gx.compare(*given, labels), gx.compare(flat(base), flat(other), labels)
    for name in ("base", "other", "kl", "reverse_kl", "js", "delta_p"):
        assert getattr(found, name).value == pytest.approx(getattr(truth, name).value, rel=2e-3, abs=2e-4), name
    assert (found.base_entropy, found.other_entropy) == pytest.approx(
        (truth.base_entropy, truth.other_entropy), rel=2e-3, abs=2e-4
    )
    assert found.same_top == truth.same_top
    cut = gx.compare(*given, labels, backend="cupy")
    assert (cut.kl.value, cut.base.value) == pytest.approx((found.kl.value, found.base.value), rel=1e-5)


# ---- the file, written ----


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize(("windows", "n_ctx", "vocab"), [(3, 8, 7), (2, 9, 6), (5, 3, 1), (2, 64, 1001)])
def test_bytes_are_those_of_llama(windows, n_ctx, vocab, dtype, tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(kld, "AT_ONCE", 4 * vocab)
    base, _, tokens = models(windows, n_ctx, vocab, 6.0)
    base[0, 0] = 3.0  # all alike: a step of 0
    base[-1, -1, 0] = -np.inf if vocab > 1 else 0.0
    base = base.astype(dtype)
    expected = llama.write(tmp_path / "theirs.kld", base.astype(np.float32), tokens).read_bytes()
    np.save(tmp_path / "tokens.npy", tokens)
    for name, array in (("flat", flat(base)), ("deep", base)):
        np.save(tmp_path / f"{name}.npy", array)
        source = open_source(tmp_path / f"{name}.npy")
        done = convert(source, f"{tmp_path}/{name}.kld", quiet, tokens=open_source(tmp_path / "tokens.npy"))
        assert (tmp_path / f"{name}.kld").read_bytes() == expected
        assert done.bytes == len(expected)
    again = open_source(f"{tmp_path}/flat.kld")  # what is read of a file makes the same file, but for rounding
    convert(again, f"{tmp_path}/again.kld", quiet, tokens=open_source(f"{tmp_path}/flat.kld::tokens"))
    back = open_source(f"{tmp_path}/again.kld")
    whole = slice(0, windows * base.shape[1]), slice(0, vocab)
    assert np.array_equal(np.isinf(back.read(*whole)), np.isinf(again.read(*whole)))
    assert back.read(*whole) == pytest.approx(again.read(*whole), abs=2e-4)


def test_what_was_lost_is_said(tmp_path, quiet):
    base, _, tokens = models(2, 8, 10, 0.5)
    base[0, 0, :5] = -40
    base[0, 0, 9] = 0
    np.save(tmp_path / "x.npy", flat(base))
    np.save(tmp_path / "t.npy", tokens)
    done = CliRunner(env={"COLUMNS": "100"}).invoke(
        app, ["convert", f"{tmp_path}/x.npy", f"{tmp_path}/y.bin", "--to", "kld", "--tokens", f"{tmp_path}/t.npy"]
    )
    assert done.exit_code == 0, done.stderr
    assert done.stdout == (
        f"{tmp_path}/y.bin: float32 of shape (6, 10), 252 bytes; 2 windows of 8 tokens, log-probabilities in 16 bits: "
        "rounded by up to 0.0001 nats, 8.33 % of them raised to 16 below their row's largest\n"
    )


WRONG = [
    ((6, 10), None, "--tokens must be given: a .kld file holds the windows of tokens that the logits are of"),
    ((6, 10), (16,), r"--tokens \(.*\) must be integers of shape \(windows, n_ctx\), got int64 of shape \(16,\)"),
    ((6, 10), (8, 2), r"--tokens \(.*\) must be integers of shape \(windows, n_ctx\), got int64 of shape \(8, 2\)"),
    (
        (6, 10),
        (2, 9),
        r"x.npy must have 8 rows for 2 windows of 9 tokens, of each those that predict its tokens 5 to 8, got 6; "
        "so many are of windows of 7 or 8 tokens",
    ),
    ((7, 10), (2, 8), r"must have 6 rows for 2 windows of 8 tokens, .*, got 7$"),
    ((2, 8, 10), (2, 8), r"must have 6 rows for 2 windows of 8 tokens, .*, got 16; .* of windows of 17 or 18 tokens"),
    ((6,), (2, 8), r"a .kld file holds logits \(rows, vocab\) of floats, and .*x.npy has float32 of shape \(6,\)"),
]


@pytest.mark.parametrize(("shape", "windows", "message"), WRONG)
def test_rows_and_windows_that_do_not_fit(shape, windows, message, tmp_path, quiet):
    np.save(tmp_path / "x.npy", np.zeros(shape, np.float32))
    tokens = None
    if windows is not None:
        np.save(tmp_path / "t.npy", np.zeros(windows, np.int64))
        tokens = open_source(tmp_path / "t.npy")
    before = names(tmp_path)
    with pytest.raises(ValueError, match=message):
        convert(open_source(tmp_path / "x.npy"), f"{tmp_path}/y.kld", quiet, tokens=tokens)
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("logit", "token", "message"),
    [
        (np.nan, 0, r"row 4 of the logits has one that is NaN or infinite"),
        (np.inf, 0, r"row 4 of the logits has one that is NaN or infinite"),
        (1e300, 0, r"row 4 of the logits has one that is NaN or infinite"),
        (0.0, 10, r"--tokens\[1, 3\] is 10, expected a class in \[0, 10\) \(in .*t.npy\)"),
        (0.0, -1, r"--tokens\[1, 3\] is -1, expected"),
    ],
)
def test_values_that_it_cannot_hold_leave_nothing(logit, token, message, tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(kld, "AT_ONCE", 11)
    x, t = np.zeros((6, 10)), np.zeros((2, 8), np.int64)
    x[4, 3], t[1, 3] = logit, token
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "t.npy", t)
    tokens = open_source(tmp_path / "t.npy")
    with pytest.raises(ValueError, match=message):
        convert(open_source(tmp_path / "x.npy"), f"{tmp_path}/y.kld", quiet, tokens=tokens)
    assert names(tmp_path) == ["t.npy", "x.npy"]


def test_tokens_are_for_kld_files_and_no_input_is_overwritten(tmp_path, quiet):
    base, _, tokens = models(2, 8, 10)
    path = llama.write(tmp_path / "x.kld", base, tokens)
    np.save(tmp_path / "x.npy", flat(base))
    source, windows = open_source(tmp_path / "x.npy"), open_source(f"{path}::tokens")
    with pytest.raises(ValueError, match=r"--tokens is for .kld files, and .*y.npy is none"):
        convert(source, f"{tmp_path}/y.npy", quiet, tokens=windows)
    with pytest.raises(ValueError, match="OUT must be another file than what is read"):
        convert(source, str(path), quiet, tokens=windows, overwrite=True)
    convert(source, f"{tmp_path}/z.kld", quiet, tokens=windows)
    assert (tmp_path / "z.kld").read_bytes() == path.read_bytes()
    convert(source, f"{tmp_path}/z.data", quiet, to="npy")
    assert (tmp_path / "z.data").read_bytes() == (tmp_path / "x.npy").read_bytes()


def test_the_space_that_it_needs_is_known_before(tmp_path, quiet, monkeypatch):
    base, _, tokens = models(2, 512, 4001)
    np.save(tmp_path / "x.npy", flat(base))
    np.save(tmp_path / "t.npy", tokens)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4 * 2**20))
    with pytest.raises(ValueError, match=r"y.kld needs 4.9 MiB, and 4.0 MiB are free"):
        convert(open_source(tmp_path / "x.npy"), f"{tmp_path}/y.kld", quiet, tokens=open_source(tmp_path / "t.npy"))


def test_a_file_of_ours_compared_by_the_command(tmp_path):
    base, other, tokens = models(4, 16, 50)
    for name, array in (("base", flat(base)), ("other", flat(other)), ("tokens", tokens)):
        np.save(tmp_path / f"{name}.npy", array)

    def command(*arguments):
        done = CliRunner().invoke(app, list(map(str, arguments)))
        assert done.exit_code == 0, done.stderr
        return done.stdout

    command("convert", tmp_path / "base.npy", tmp_path / "base.kld", "--tokens", tmp_path / "tokens.npy")
    found = json.loads(command("compare", tmp_path / "base.kld", tmp_path / "other.npy", "--format", "json"))
    expected = llama.Statistics(tmp_path / "base.kld", flat(other)).shown()
    assert found["base_perplexity"]["value"] == pytest.approx(expected["base_perplexity"][0], rel=1e-6)
    assert found["kl"]["value"] == pytest.approx(expected["kl"][0], abs=1e-4)
