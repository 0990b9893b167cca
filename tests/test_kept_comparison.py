"""Runs of `compare`: what they keep, who may read it, and that killed and resumed they end as if left alone."""

import json
import random
import re
from dataclasses import fields, replace

import numpy as np
import oracle
import pyarrow.parquet as pq
import pytest
from killing import has_written, interrupt, kill, rows_of, run_command, start_command, wait_until
from run_child import WHAT
from test_comparison import run as compare_command
from test_comparison import two_models
from typer.testing import CliRunner

import gpuxent as gx
from gpuxent import calibration
from gpuxent.cli import app
from gpuxent.evaluation.comparison import report
from gpuxent.evaluation.comparison.kept import comparison_of_run, read_pair_tokens
from gpuxent.evaluation.runs import token_record
from gpuxent.evaluation.runs.directory import Run, RunDirectory, read_tokens, run_kind
from gpuxent.evaluation.statistics.result import finite
from gpuxent.evaluation.statistics.tokens import BlockResult, PairTokens, Tokens

ROWS, VOCAB = 6000, 40


def pairs_of_tokens(first, stop):
    """Numbers that depend on nothing but the row, among them what is no number."""
    row = np.arange(first, stop, dtype=np.int64)
    row = row[row % 3 != 1]
    noise = (row * 2654435761 % 2**32) / 2**32
    columns = {name: noise ** (i + 1) * 30 for i, name in enumerate(PairTokens.floats)}
    columns["kl"] = np.where(row == 77, np.inf, np.where(row == 200, np.nan, -noise))
    whole = {name: row * (i + 3) % 1000 for i, name in enumerate(("label", "position", "base_rank", "other_rank"))}
    return PairTokens(row=row, **columns, **whole, same_top=row % 2, document=row // 100)


class Nothing:
    def to_json(self):
        return ""


def joined(parts):
    parts = list(parts)
    return {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}


@pytest.mark.parametrize("with_documents", [True, False])
def test_every_bit_of_the_record(tmp_path, monkeypatch, with_documents):
    """Through the ledger and through files, in any order of the blocks."""
    monkeypatch.setattr(token_record, "PART_TOKENS", 200)
    expected = pairs_of_tokens(0, 1200)
    blocks = [(start, start + 60) for start in range(0, 1200, 60)]
    random.Random(1).shuffle(blocks)
    with RunDirectory(tmp_path, WHAT, 1200, record=PairTokens) as directory:
        for i, (first, stop) in enumerate(blocks):
            tokens = pairs_of_tokens(first, stop)
            if not with_documents:
                tokens = replace(tokens, document=None)
            directory.add(BlockResult(first, 60, Nothing(), tokens, "numpy"))
            if i == 12:
                waiting = np.concatenate([part.kl for part in directory.tokens()])
                assert len(waiting) == 13 * 40
    assert len(list((tmp_path / "tokens").iterdir())) > 2
    found = joined(read_pair_tokens(tmp_path))
    names = [field.name for field in fields(PairTokens)]
    assert list(found) == (names if with_documents else names[:-1])
    for name, column in found.items():
        assert column.dtype == (np.float64 if name in PairTokens.floats else np.int64)
        assert column.tobytes() == getattr(expected, name).tobytes(), name
    part = pq.ParquetFile(min((tmp_path / "tokens").iterdir()))
    assert part.schema_arrow.metadata == {b"gpuxent": b"gpuxent pairs of tokens, version 2"}
    assert part.schema_arrow.names == list(found)


def test_a_record_of_pairs_needs_more_room(tmp_path):
    with pytest.raises(OSError, match=r"needs about [\d,]+\.\d GB for the record of 1,000,000,000,000 tokens") as pairs:
        RunDirectory(tmp_path / "a", WHAT, 10**12, record=PairTokens)
    with pytest.raises(OSError, match="GB for the record") as single:
        RunDirectory(tmp_path / "b", WHAT, 10**12)
    pairs, single = (float(re.search(r"about ([\d,.]+) GB", str(e.value))[1].replace(",", "")) for e in (pairs, single))
    assert (round(pairs, -2), round(single, -2)) == (88_000, 32_000)


# ---- a comparison of logits, kept ----


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(folder, base, other, labels, documents); in the folder the runs `both`, `base` and `other`."""
    folder = tmp_path_factory.mktemp("two")
    p, q, y, d = two_models()
    d = np.sort(d)
    gx.compare(p, q, y, documents=d, run=folder / "both", memory=2000)
    gx.evaluate(p, y, documents=d, run=folder / "base")
    gx.evaluate(q, y, documents=d, run=folder / "other")
    return folder, p, q, y, d


def test_what_is_kept_is_what_each_model_and_each_divergence_says(two):
    folder, p, q, y, _ = two
    found = joined(read_pair_tokens(folder / "both"))
    for side in ("base", "other"):
        own = joined(read_tokens(folder / side))
        for name, column in own.items():
            kept = found[name if name in found else f"{side}_{name}"]
            assert kept.tobytes() == column.tobytes(), (side, name)
        assert PairTokens(**found).side(side).columns.keys() == own.keys()
    on = y != -100
    for name, expected in (
        ("kl", oracle.kl_divergence(p, q)),
        ("reverse_kl", oracle.kl_divergence(q, p)),
        ("js", oracle.js_divergence(p, q)),
        ("same_top", p.argmax(1) == q.argmax(1)),
    ):
        assert found[name] == pytest.approx(np.asarray(expected, float)[on], rel=2e-6), name
    assert 0 < found["same_top"].sum() < on.sum()


def test_the_result_is_that_of_compare(two):
    folder, p, q, y, d = two
    expected = gx.compare(p, q, y, documents=d)
    assert (expected.rows, expected.share, expected.mixed) == (60, 1.0, ())
    with Run.open(folder / "both") as kept:
        assert kept.result == json.loads(json.dumps(expected.to_dict()))
        assert (kept.kind, kept.complete) == ("comparison", True)
    assert gx.compare(p, q, y, documents=d, run=folder / "both", resume=True) == expected


def test_of_its_tokens_all_numbers_are_the_same_and_quantiles_exact(two):
    folder, p, q, y, d = two
    found, streamed, column = comparison_of_run(folder / "both"), gx.compare(p, q, y, documents=d), None
    assert found.quantile_error == 0 < streamed.quantile_error
    column = joined(read_pair_tokens(folder / "both"))
    change = np.exp(-column["other_nll"]) - np.exp(-column["base_nll"])
    for quantiles, values in ((found.kl_quantiles, column["kl"]), (found.delta_p_quantiles, change)):
        assert list(quantiles.values()) == pytest.approx(np.quantile(values, list(quantiles)), rel=1e-14)
    exact = {"kl_quantiles": found.kl_quantiles, "delta_p_quantiles": found.delta_p_quantiles, "quantile_error": 0}
    assert found == replace(streamed, **exact)


def test_rows_that_do_not_count_and_no_documents(tmp_path):
    p, q, _, _ = two_models()
    nothing = gx.compare(p, q, np.full(60, -100), run=tmp_path / "none")
    assert (nothing.scored, nothing.kl, nothing.rows, nothing.share) == (0, None, 60, 1.0)
    assert str(comparison_of_run(tmp_path / "none")) == str(replace(nothing, quantile_error=0.0))
    y = np.where(np.arange(60) < 40, -100, 3)
    one = gx.compare(p, q, y, run=tmp_path / "some", memory=500)  # blocks of which none counts
    assert one == gx.compare(p, q, y)
    assert joined(read_pair_tokens(tmp_path / "some"))["row"].tolist() == list(range(40, 60))
    assert comparison_of_run(tmp_path / "some").log_ratio == one.log_ratio


def test_losses_that_are_not_finite(tmp_path):
    p = np.array([[0.0, 0.0, -np.inf], [0.0, 0.0, 0.0], [np.nan, 0.0, 0.0]])
    q = np.array([[0.0, -np.inf, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    r = gx.compare(p, q, np.array([1, 1, 0]), run=tmp_path / "run")
    found = joined(read_pair_tokens(tmp_path / "run"))
    assert found["other_nll"][0] == np.inf
    assert np.isnan(found["base_nll"][2])
    assert (found["kl"][0], found["kl"][1]) == (np.inf, 0)
    exact = comparison_of_run(tmp_path / "run")
    assert (r.bad, exact.bad) == (2, 2)
    assert all(np.isnan(list(exact.kl_quantiles.values())))  # of a row the divergence is NaN
    gx.compare(p[:2], q[:2], np.array([1, 1]), run=tmp_path / "less")
    assert [comparison_of_run(tmp_path / "less").kl_quantiles[level] for level in (1, 0.5, 0)] == [np.inf, np.inf, 0]
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == json.loads(json.dumps(finite(r.to_dict())))


# ---- what a folder holds ----


def test_a_folder_of_the_wrong_kind(two):
    folder, p, q, y, _ = two
    assert (run_kind(folder / "both"), run_kind(folder / "base")) == ("comparison", "perplexity")
    not_one = rf"^{folder}/both must hold a run of perplexity, got one of comparison$"
    not_two = rf"^{folder}/base must hold a run of comparison, got one of perplexity$"
    for attempt, message in (
        (lambda: gx.compare(folder / "both", folder / "base"), not_one),
        (lambda: gx.compare(folder / "base", folder / "both"), not_one),
        (lambda: calibration.reliability_of_run(folder / "both"), not_one),
        (lambda: list(read_tokens(folder / "both")), not_one),
        (lambda: list(read_pair_tokens(folder / "base")), not_two),
        (lambda: comparison_of_run(folder / "base"), not_two),
        (
            lambda: gx.evaluate(p, y, run=folder / "both", resume=True),
            rf"^{folder}/both holds a run of comparison; one of perplexity needs another folder$",
        ),
        (
            lambda: gx.compare(p, q, y, run=folder / "base"),
            rf"^{folder}/base holds a run of perplexity; one of comparison needs another folder$",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
    with Run.open(folder / "both") as kept:
        for wrong in (lambda: list(read_tokens(kept)), lambda: calibration.reliability_of_run(kept)):
            with pytest.raises(ValueError, match=not_one):
                wrong()
    for command in (["compare", folder / "both", folder / "both"], ["calibrate", "--run", folder / "both"]):
        done = CliRunner().invoke(app, list(map(str, command)))
        assert done.exit_code == 3
        assert done.stderr == f"gpuxent: {folder}/both must hold a run of perplexity, got one of comparison\n"


def test_a_run_from_before_there_were_comparisons(tmp_path):
    """Its ledger does not say of what it is."""
    p, _, y, _ = two_models()
    gx.evaluate(p, y, run=tmp_path / "run")
    with Run.open(tmp_path / "run") as kept:
        about = dict(kept._ledger.about)
        assert about.pop("kind") == "perplexity"
        kept._ledger.about = about
        assert kept.kind == "perplexity"
        kept.expect(Tokens)


def test_a_lost_or_foreign_file_of_tokens(tmp_path):
    p, q, y, _ = two_models()
    gx.compare(p, q, y, run=tmp_path / "run")
    gx.evaluate(p, y, run=tmp_path / "other")
    (part,), (foreign,) = ((tmp_path / name / "tokens").iterdir() for name in ("run", "other"))
    part.write_bytes(foreign.read_bytes())
    with pytest.raises(ValueError, match=f"{part} cannot be read: its format is 'gpuxent tokens, version 1', expected"):
        comparison_of_run(tmp_path / "run")
    part.unlink()
    with pytest.raises(ValueError, match=f"{part} cannot be read"):
        comparison_of_run(tmp_path / "run")
    with pytest.raises(ValueError, match=f"{part} is missing: the run cannot go on"):
        gx.compare(p, q, y, run=tmp_path / "run", resume=True)


def test_options_that_go_together(tmp_path, two):
    folder, p, q, y, _ = two
    with pytest.raises(ValueError, match="resume is about a run in a folder, but run is not given"):
        gx.compare(p, q, y, resume=True)
    for name, value in (("run", tmp_path / "x"), ("resume", True), ("allow_mixed", True)):
        with pytest.raises(ValueError, match=f"{name} goes with labels"):
            gx.compare(folder / "base", folder / "other", **{name: value})
    status, _, err = compare_command(folder / "base", folder / "other", "-o", tmp_path / "x")
    assert (status, "run goes with labels" in err) == (3, True)
    assert not (tmp_path / "x").exists()


def test_a_part_of_the_rows_and_several_machines_are_said(two):
    result = replace(gx.compare(*two[1:4]), share=0.9999, mixed=("a", "b"))
    first, *more = report.lines(result)
    assert first == "partial: 99.9 % of the rows  scored 53  bad 0  mixed: 2 backends or CPU types"
    assert more[:2] == ["mixed: rows computed by a", "mixed: rows computed by b"]
    assert result.to_dict()["mixed"] == ["a", "b"]


# ---- killed and interrupted ----


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    x = rng.normal(0, 3, (ROWS, VOCAB)).astype(np.float32)
    np.save(folder / "base.npy", x)
    np.save(folder / "other.npy", x + rng.normal(0, 0.5, x.shape).astype(np.float32))
    np.save(folder / "labels.npy", np.where(rng.random(ROWS) < 0.1, -100, rng.integers(0, VOCAB, ROWS)))
    np.save(folder / "documents.npy", np.cumsum(rng.random(ROWS) < 0.01))
    return folder


def arguments(data, *options):
    files = [data / "base.npy", data / "other.npy", "--labels", data / "labels.npy"]
    how = ["--documents", data / "documents.npy", "--shift", 1, "--format", "json", "--backend", "numpy"]
    return ["compare", *files, *how, *options]


@pytest.fixture(scope="module")
def left_alone(data, tmp_path_factory):
    """What the command prints, and the folder of a run in one go and few blocks."""
    run = tmp_path_factory.mktemp("whole") / "run"
    code, out, err = run_command(*arguments(data, "-o", run))
    assert code == 0, err
    assert run_command(*arguments(data))[1] == out
    return run, out


def assert_same(run, out, left_alone):
    whole, printed = left_alone
    assert out == printed
    assert (run / "result.json").read_bytes() == (whole / "result.json").read_bytes()
    found, expected = joined(read_pair_tokens(run)), joined(read_pair_tokens(whole))
    assert found.keys() == expected.keys()
    for name, column in expected.items():
        assert found[name].tobytes() == column.tobytes(), name


def test_killed_at_any_moment(data, left_alone, tmp_path):
    """By SIGKILL, with other workers and memory each time."""
    run, chance, finished = tmp_path / "run", random.Random(3), set()
    for kills in range(5):
        workers = ["--workers", 2] if kills == 3 else []
        how = ["--memory", chance.choice(["1kB", "2kB", "4kB"]), *(["--resume"] if kills else []), *workers]
        process = start_command(*arguments(data, "-o", run, *how))
        wait_until(has_written(run, chance.randint(5, 25)), process)
        assert process.poll() is None, process.communicate()[1]
        kill(process)
        now = rows_of(run)
        assert now >= finished
        finished = now
    assert 50 < len(finished) < ROWS
    so_far = comparison_of_run(run)
    assert so_far.share == len(finished) / ROWS
    code, out, err = run_command(*arguments(data, "-o", run, "--resume", "--workers", 2))
    assert code == 0, err
    assert_same(run, out, left_alone)


@pytest.mark.parametrize("workers", [[], ["--workers", 2]], ids=["threads", "processes"])
def test_ctrl_c_and_the_end(data, left_alone, tmp_path, workers):
    run, err = tmp_path / "run", tmp_path / "err"
    with open(err, "w") as file:
        process = start_command(*arguments(data, "-o", run, "--memory", "1kB", *workers), err=file)
    wait_until(has_written(run, 5), process)
    code, out, said = interrupt(process, err)
    assert code == 4, said
    assert said.endswith(f"gpuxent: interrupted; --run {run} --resume goes on\n")
    share = len(rows_of(run)) / ROWS
    assert 0 < share < 1
    assert json.loads(out)["share"] == json.loads((run / "result.json").read_text())["share"] == share
    code, out, said = run_command(*arguments(data, "-o", run))
    assert (code, out) == (3, "")
    assert "give --resume to go on with it, or another folder" in said
    code, out, said = run_command(*arguments(data, "-o", run, "--resume"))
    assert code == 0, said
    assert_same(run, out, left_alone)


def test_ctrl_c_of_what_is_not_kept(data, tmp_path):
    """The part that is done is shown; nothing goes on with it."""
    err = tmp_path / "err"
    with open(err, "w") as file:
        process = start_command(*arguments(data, "--memory", "200B"), err=file)
    wait_until(lambda: "rows" in err.read_text(), process)
    code, out, said = interrupt(process, err)
    assert code == 4, said
    assert said.endswith("gpuxent: interrupted\n")
    assert 0 < json.loads(out)["share"] < 1


def test_other_inputs_are_refused(data, tmp_path):
    p, q, y, d = (np.load(data / f"{name}.npy") for name in ("base", "other", "labels", "documents"))
    run = tmp_path / "run"
    gx.compare(p, q, y, documents=d, limit=50, run=run)
    for change, message in (
        (lambda: gx.compare(p + 1, q, y, documents=d, limit=50, run=run, resume=True), "base changed: the array has"),
        (lambda: gx.compare(p, q + 1, y, documents=d, limit=50, run=run, resume=True), "other changed: the array has"),
        (lambda: gx.compare(p, q, y, documents=d + 1, limit=50, run=run, resume=True), "documents changed"),
        (lambda: gx.compare(p, q, y, documents=d, limit=60, run=run, resume=True), "option limit: 50 -> 60"),
        (
            lambda: gx.compare(p, q, y, documents=d, limit=50, other_temperature=2, run=run, resume=True),
            "option other_temperature: 1.0 -> 2.0",
        ),
        (lambda: gx.compare(p, q, y, documents=d, limit=50, shift=1, run=run, resume=True), "option shift: 0 -> 1"),
    ):
        with pytest.raises(ValueError, match=f"cannot go on with what is not the same run: {message}"):
            change()
    gx.compare(p, q, y, documents=d, limit=50, run=run, resume=True)
