"""Figures of runs: their data against the tokens, and what is drawn, read back by readers of their own."""

import csv
import hashlib
import io
import math
import re
import subprocess
import sys
import warnings
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib import image

import gpuxent as gx
from gpuxent.evaluation.reports import reported
from gpuxent.evaluation.reports.figures.chosen import NAMES, figures
from gpuxent.evaluation.reports.figures.figure import Figure, to_csv, to_html_svg, to_png, to_svg
from gpuxent.evaluation.reports.figures.style import PALETTE, SERIES, shown
from gpuxent.evaluation.reports.reported import open_reported
from gpuxent.evaluation.runs.directory import RunDirectory
from gpuxent.evaluation.statistics.summary import Summary
from gpuxent.evaluation.statistics.tokens import BlockResult, Tokens

SVG = "{http://www.w3.org/2000/svg}"
Z = NormalDist().inv_cdf(0.975)
HOSTILE = (
    "<script>alert(1)<",
    "$x$ and $\\frac{1}{0}$",
    "a\"b'c&amp;d",
    "🦊 <b>模型</b>",
    "שלום\u202etxt.exe",
    "line\nbreak\x01\x7f",
    "n" * 300,
    "style='fill: #1f52d0' <title>x</title>]]>",
    "%s {x} \\n ~`",
)


def tokens_of(nll, documents=None, positions=None, first=0, seed=0):
    nll = np.asarray(nll, np.float64)
    rng = np.random.default_rng(seed)
    n = nll.size
    p_max = np.maximum(rng.uniform(0.02, 1, n), np.exp(-np.nan_to_num(nll, nan=9.0)))
    rank = np.where(rng.uniform(size=n) < p_max * 0.8, 0, 3)
    return Tokens(
        row=np.arange(first, first + n),
        label=rng.integers(0, 9, n),
        position=np.arange(n) % 100 if positions is None else np.asarray(positions),
        nll=nll,
        entropy=rng.uniform(0, 2, n),
        p_max=np.where(np.isnan(nll), np.nan, p_max),
        rank=rank,
        document=None if documents is None else np.asarray(documents, np.int64),
    )


def keep(folder, tokens, rows=None, ignored=0, kept=True, blocks=4):
    """A run's folder with these tokens, in some blocks."""
    n = len(tokens)
    what = {
        "format": 1,
        "gpuxent": "0.5",
        "sources": {"documents": None if tokens.document is None else {"name": "ids.npy"}},
        "options": {"topk": [1, 5], "bins": 15, "temperature": 1.0},
    }
    with RunDirectory(folder, what, n + ignored if rows is None else rows, tokens=kept) as directory:
        edges = np.unique(np.linspace(0, n, blocks + 1).astype(int))
        for low, high in pairwise(edges.tolist()):
            part = Tokens(**{name: column[low:high] for name, column in tokens.columns.items()})
            extra = ignored if high == n else 0
            directory.add(BlockResult(low, high - low + extra, Summary.of(part, extra), part, "numpy"))
    return folder


def big_tokens(seed=0, n=6000, scale=1.0):
    rng = np.random.default_rng(seed)
    documents = np.sort(rng.integers(0, 50, n)) * 7 + 3
    documents[::10] = 500  # one that comes again and again
    return tokens_of(rng.gamma(1.2, 2.0 * scale, n) * (1 + documents / 400), documents, seed=seed)


BIG = big_tokens()


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    return open_reported(keep(tmp_path_factory.mktemp("runs") / "big", BIG, ignored=10)).runs[0]


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    folder = tmp_path_factory.mktemp("six")
    return open_reported([keep(folder / f"run{i}", big_tokens(i, 900, 1 + i / 5)) for i in range(6)]).runs


def by_name(runs, comparisons=()):
    return {figure.name: figure for figure in figures(runs, comparisons)}


def columns_of(figure):
    """What the CSV says, as arrays."""
    rows = list(csv.reader(io.StringIO(to_csv(figure))))
    return {head: np.array(cells) for head, cells in zip(rows[0], zip(*rows[1:], strict=True), strict=True)}


def numbers(figure, *names):
    found = columns_of(figure)
    return [found[name].astype(np.float64) for name in names]


def written(figure):
    return to_png(figure), to_svg(figure), to_html_svg(figure), to_csv(figure)


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg.encode()).iter(f"{SVG}text")]


def one_run(folder, *columns, name="run", **options):
    return open_reported(keep(folder / name, tokens_of(*columns), **options)).runs


# ---- data ----


def test_reliability_is_that_of_the_tokens(big):
    lower, upper, count, confidence, accuracy = numbers(
        by_name([big])["reliability"], "lower", "upper", "tokens", "confidence", "accuracy"
    )
    ece = 0.0
    for i in range(15):
        inside = (BIG.p_max > i / 15) & (BIG.p_max <= (i + 1) / 15) if i else BIG.p_max <= 1 / 15
        assert (lower[i], upper[i]) == pytest.approx((i / 15, (i + 1) / 15))
        assert count[i] == inside.sum()
        assert confidence[i] == pytest.approx(BIG.p_max[inside].mean(), rel=1e-12)
        assert accuracy[i] == pytest.approx((BIG.rank[inside] == 0).mean(), rel=1e-12)
        ece += abs((BIG.rank[inside] == 0).sum() - BIG.p_max[inside].sum()) / len(BIG)
    assert f"(ECE) is {ece:.4f} (95 % interval " in by_name([big])["reliability"].description
    low, high = numbers(by_name([big])["reliability"], "accuracy_low", "accuracy_high")
    assert (low < accuracy).all()
    assert (high > accuracy).all()


def test_losses_are_counted_exactly(big):
    figure = by_name([big])["losses"]
    lower, upper, count, share = numbers(figure, "lower", "upper", "tokens", "share_per_octave")
    assert (lower[1:] == upper[:-1]).all()
    expected = [((BIG.nll >= a) & (BIG.nll < b)).sum() for a, b in zip(lower, upper, strict=True)]
    assert count.tolist() == expected
    below = int((BIG.nll < lower[0]).sum())
    assert count.sum() + below == len(BIG)
    assert 0 < below < 0.01 * len(BIG)
    assert f"{below} tokens lie below" in figure.description
    np.testing.assert_allclose(share * np.log2(upper / lower), count / len(BIG), rtol=1e-12)
    np.testing.assert_allclose(np.log2(upper / lower), 1 / 6, rtol=0.08)


def test_positions(big):
    first, last, count, mean, stderr = numbers(
        by_name([big])["positions"], "first", "last", "scored", "cross_entropy", "stderr_iid"
    )
    assert first.tolist() == [0, 1, 2, 4, 8, 16, 32, 64]
    for i, (low, high) in enumerate(zip(first, last, strict=True)):
        nll = BIG.nll[(BIG.position >= low) & (BIG.position <= high)]
        assert count[i] == nll.size
        assert mean[i] == pytest.approx(nll.mean(), rel=1e-12)
        assert stderr[i] == pytest.approx(nll.std(ddof=1) / math.sqrt(nll.size), rel=1e-9)


def test_documents_are_sorted(big):
    figure = by_name([big])["documents"]
    rank, document, count, mean, stderr = numbers(figure, "rank", "document", "scored", "cross_entropy", "stderr_iid")
    groups = defaultdict(list)
    for name, loss in zip(BIG.document.tolist(), BIG.nll.tolist(), strict=True):
        groups[name].append(loss)
    expected = sorted(groups, key=lambda name: math.fsum(groups[name]) / len(groups[name]))
    assert document.tolist() == expected
    assert rank.tolist() == [*range(1, len(groups) + 1)]
    for i, name in enumerate(expected):
        nll = np.array(groups[name])
        assert count[i] == nll.size
        assert mean[i] == pytest.approx(nll.mean(), rel=1e-12)
        assert stderr[i] == pytest.approx(nll.std(ddof=1) / math.sqrt(nll.size), rel=1e-9)
    highest, lowest = (f"{name} ({np.mean(groups[name]):.4g})" for name in (expected[-1], expected[0]))
    assert f"lowest: document {lowest}" in figure.description
    assert f"highest: {highest}" in figure.description
    assert "\n".join(["highest documents", highest]) in "\n".join(texts(to_svg(figure)))


def test_running_mean_and_its_errors(big):
    tokens, mean, iid, cluster = numbers(
        by_name([big])["running"], "tokens", "cross_entropy", "stderr_iid", "stderr_cluster"
    )
    assert tokens[0] <= 30
    assert tokens[-1] == len(BIG)
    assert 200 <= tokens.size <= 400
    assert (np.diff(tokens) > 0).all()
    for i in (*range(0, tokens.size, 20), -1):
        n = int(tokens[i])
        nll, ids = BIG.nll[:n], BIG.document[:n]
        assert mean[i] == pytest.approx(nll.mean(), rel=1e-12)
        assert iid[i] == pytest.approx(nll.std(ddof=1) / math.sqrt(n), rel=1e-9)
        residuals = [(nll[ids == d] - nll.mean()).sum() for d in set(ids.tolist())]
        g = len(residuals)
        expected = math.sqrt(g / (g - 1) * sum(r * r for r in residuals)) / n if g > 1 else math.nan
        assert cluster[i] == pytest.approx(expected, rel=1e-9, nan_ok=True)
    assert mean[-1] == pytest.approx(big.result.cross_entropy, rel=1e-14)
    assert iid[-1] == pytest.approx(big.result.stderr_iid, rel=1e-12)
    assert cluster[-1] == pytest.approx(big.result.stderr_cluster, rel=1e-12)


def test_running_does_not_depend_on_blocks(tmp_path, big):
    """Nor on how many tokens are read at once."""
    again = open_reported(keep(tmp_path / "big", BIG, ignored=10, blocks=41)).runs[0]
    np.testing.assert_array_equal(again.running.tokens, big.running.tokens)
    for name in ("mean", "stderr_iid", "stderr_cluster"):
        np.testing.assert_allclose(getattr(again.running, name), getattr(big.running, name), rtol=1e-11)
    assert again.result == big.result
    assert again.reliability == big.reliability


def test_headline_has_intervals(six):
    name, mean, low, high = (columns_of(by_name(six)["headline"])[c] for c in ("run", "cross_entropy", "low", "high"))
    assert name.tolist() == [f"run{i}" for i in range(6)]
    for i, run in enumerate(six):
        assert float(mean[i]) == run.result.cross_entropy
        assert float(high[i]) == pytest.approx(run.result.cross_entropy + Z * run.result.stderr_cluster, rel=1e-9)
        assert float(low[i]) == pytest.approx(run.result.cross_entropy - Z * run.result.stderr_cluster, rel=1e-9)
        assert f"{name[i]}: {run.result.cross_entropy:.6g} nats per token (95 %" in by_name(six)["headline"].description


def test_of_logits(tmp_path):
    """From `evaluate` to the figures: the losses of the logits themselves."""
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 3, (400, 11)).astype(np.float32)
    labels, documents = rng.integers(0, 11, 400), np.repeat(np.arange(20), 20)
    about = {"document": range(20), "n": [30] * 20, "of": ["a", "b"] * 10}
    options = {"metadata": about, "bytes": "n", "group_by": "of"}
    result = gx.evaluate(logits, labels, documents=documents, run=tmp_path / "run", **options)
    (run,) = open_reported(tmp_path / "run").runs
    assert run.result == result  # bits per byte and groups too, which the ledger does not know
    assert run.result.bits_per_byte is not None
    assert [group.group for group in run.result.groups] == ["a", "b"]
    assert run.about["sources"]["logits"]["shape"] == [400, 11]
    assert run.about["options"]["shift"] == 0
    assert run.complete
    assert run.reliability.ece.value == result.ece
    p = np.exp(logits.astype(np.float64))
    nll = -np.log(p[np.arange(400), labels] / p.sum(axis=1))
    lower, upper, count = numbers(by_name([run])["losses"], "lower", "upper", "tokens")
    below = [(nll < edge).sum() for edge in (*lower, upper[-1])]
    assert np.abs(np.diff(below) - count).max() <= 1  # a loss beside an edge


# ---- comparisons ----


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    rng = np.random.default_rng(1)
    base, folder = rng.normal(0, 2, (500, 7)), tmp_path_factory.mktemp("compared") / "q4"
    other, labels = base + rng.normal(0, 0.3, (500, 7)), rng.integers(0, 7, 500)
    gx.compare(base, other, labels, backend="numpy", run=folder)
    return open_reported(folder)


def test_kld(compared):
    assert not compared.runs
    (found,) = compared.comparisons
    comparison = found.result
    figure = by_name([], [found])["kld"]
    level, kl = numbers(figure, "quantile", "kl")
    assert dict(zip(level, kl, strict=True)) == dict(sorted(comparison.kl_quantiles.items()))
    for text in (f"mean {comparison.kl.value:.4g} ±", f"median {comparison.kl_quantiles[0.5]:.3g}"):
        assert text in figure.description
    check_drawn(figure)
    zeros = replace(comparison, kl_quantiles=dict.fromkeys(comparison.kl_quantiles, 0.0), bad=2)
    same = replace(found, name="same", result=replace(zeros, share=0.2509))
    figure = by_name([], [found, same])["kld"]
    assert "Partial: 25 % of the rows are done." in figure.description
    assert "2 of 500 tokens have a NaN or infinite loss" in figure.description
    assert any("hollow" in text for text in texts(to_svg(figure)))
    check_drawn(figure)
    assert by_name([], [replace(found, result=replace(comparison, kl_quantiles=None))]) == {}


# ---- forms ----


def check_drawn(figure):
    """In all forms."""
    png, svg, html, _ = written(figure)
    pixels = image.imread(io.BytesIO(png))
    assert pixels.shape[1] == 1000
    coloured = np.ptp(pixels[..., :3], axis=2) > 0.2  # the lines, which are no grey
    assert 0.0005 < coloured.mean() < 0.3
    check_svg(svg, figure, "")
    check_for_page(html, figure)


def check_svg(text, figure, prefix):
    root = ElementTree.fromstring(text.encode())
    check_accessible(root, figure, prefix)
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert all(name.startswith(prefix) for name in ids)
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', text)
    assert used
    assert set(used) <= set(ids)
    known = ("svg", "title", "desc", "defs", "g", "path", "use", "text", "clipPath", "rect", "tspan")
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= set(known)


def check_accessible(root, figure, prefix):
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    title, description = root[0], root[1]
    assert (title.tag, title.text) == (f"{SVG}title", figure.title)
    assert (description.tag, description.text) == (f"{SVG}desc", figure.description)
    assert root.get("aria-labelledby") == f"{prefix}title {prefix}desc" == f"{title.get('id')} {description.get('id')}"


def check_for_page(html, figure):
    check_svg(html, figure, f"figure-{figure.name}-")
    assert html.startswith("<svg ")
    root = ElementTree.fromstring(html.encode())
    assert root.get("width") is None
    assert root.get("height") is None
    assert len(root.get("viewBox").split()) == 4
    assert "tabular-nums" in root.get("style")
    styles = " ".join(element.get("style", "") for element in root.iter())
    assert "#" not in styles.replace("url(#", "")
    assert "font-family" not in styles
    variables = set(re.findall(r"var\(--([a-z0-9-]+)\)", styles))
    assert {"ink", "grid"} <= variables <= set(PALETTE)


def test_every_figure_in_every_form(big, six):
    found = figures([big])
    assert [figure.name for figure in found] == ["reliability", "losses", "positions", "documents", "running"]
    several = figures(six)
    assert [figure.name for figure in several] == list(NAMES[:-1])
    for figure in (*found, several[0]):
        check_drawn(figure)
    for figure in several[1:]:
        check_for_page(to_html_svg(figure), figure)
    svg = to_html_svg(several[1])
    assert {f"var(--series-{i})" for i in range(1, 7)} <= set(re.findall(r"var\(--series-\d\)", svg))


def test_a_run_keeps_its_colour(six, tmp_path):
    """Also in figures that others are not in."""
    (plain,) = one_run(tmp_path, [1.0, 2.0, 3.0], name="plain")
    svg = to_html_svg(by_name([plain, six[0]])["documents"])
    assert "var(--series-2)" in svg
    assert "var(--series-1)" not in svg
    assert "run0" in texts(svg)  # whose line it is
    assert "run0: 51 documents" in by_name([plain, six[0]])["documents"].description


def test_svg_alone_has_a_heading_and_no_time(big):
    svg = to_svg(by_name([big])["losses"])
    assert svg.startswith('<?xml version="1.0" encoding="utf-8"?>\n<svg ')
    assert "Losses of tokens: big" in texts(svg)
    assert "Losses of tokens: big" not in texts(to_html_svg(by_name([big])["losses"]))
    assert not re.search(r"20\d\d-\d\d-\d\d|metadata|<style", svg)


def test_marks_say_their_numbers(big, six, compared):
    """Where the pointer is."""

    def tips(figure, line):
        (group,) = (g for g in ElementTree.fromstring(to_html_svg(figure).encode()).iter() if g.get("id") == line)
        return [title.text for title in group.iter(f"{SVG}title")]

    found = by_name([big])
    ranges = big.result.by_position
    assert tips(found["positions"], "figure-positions-marks-0") == [
        f"big\nposition {p.first}{f'-{p.last}' if p.last > p.first else ''}: {p.cross_entropy:.4g} nats, "
        f"{p.scored:,} tokens"
        for p in ranges
    ]
    said = tips(found["reliability"], "figure-reliability-marks-0")
    assert len(said) == 15
    lowest = BIG.p_max <= 1 / 15
    assert said[0] == (
        f"big\naccuracy {(BIG.rank[lowest] == 0).mean():.3f} at a confidence of {BIG.p_max[lowest].mean():.3f}, "
        f"{lowest.sum()} tokens"
    )
    ids = numbers(found["documents"], "document")[0].astype(int)
    said = tips(found["documents"], "figure-documents-marks-0")
    assert [int(re.match(r"big\ndocument (\d+): ", tip)[1]) for tip in said] == ids.tolist()
    assert tips(by_name(six)["headline"], "figure-headline-marks-3")[0].startswith("run3: ")
    quantiles = compared.comparisons[0].result.kl_quantiles
    said = tips(by_name([], compared.comparisons)["kld"], "figure-kld-marks-0")
    assert [float(tip.split()[-2]) for tip in said] == [
        float(f"{v:.4g}") for _, v in sorted(quantiles.items()) if v > 0
    ]


def test_colours_have_contrast():
    def luminance(colour):
        parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    def contrast(a, b):
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    for theme in (0, 1):
        colours = {name: pair[theme] for name, pair in PALETTE.items()}
        assert len(set(colours.values())) == len(colours)
        paper = colours.pop("paper")
        for name, colour in colours.items():
            least = {"ink": 7, "muted": 4.5, "grid": 1.1}.get(name, 3.5)
            assert contrast(colour, paper) >= least, name
    assert len(SERIES) == 6


def test_hostile_names(big):
    """Data is text, whatever it looks like, and nothing else."""
    runs = [replace(big, name=name) for name in HOSTILE]
    for figure in figures(runs):
        assert list(dict.fromkeys(columns_of(figure)["run"])) == list(HOSTILE)
        check_names(to_html_svg(figure), HOSTILE, 24 if figure.name == "headline" else 40)
    for name in HOSTILE:
        figure = by_name([replace(big, name=name)])["losses"]
        check_names(to_svg(figure), [name], 40)
        assert figure.description in [e.text for e in ElementTree.fromstring(to_svg(figure).encode())]
    assert len(to_png(figures(runs)[0])) > 5000


def check_names(svg, names, longest):
    root = ElementTree.fromstring(svg.encode())  # is XML, without control characters
    assert "<script" not in svg
    assert not any(element.tag.lower().endswith(("script", "}b", "foreignobject")) for element in root.iter())
    drawn = "\n".join(text or "" for text in texts(svg))
    for name in names:
        assert shown(name, longest) in drawn


def test_shown_names():
    assert shown("line\nbreak\x01\u202e") == "line\\nbreak\\x01\\u202e"
    assert shown("模型 🦊") == "模型 🦊"
    long = shown("ab" * 100 + "end")
    assert len(long) <= 41
    assert long.startswith("abab")
    assert long.endswith("bend")


def digests(runs):
    found = by_name(runs)
    return [hashlib.sha256(repr(written(found[name])).encode()).hexdigest() for name in ("reliability", "documents")]


def test_same_bytes_every_time(tmp_path):
    """In another process too, and whatever the user's settings of matplotlib are."""
    keep(tmp_path / "run", big_tokens(n=500))
    code = (
        "import sys, test_figures; from gpuxent.evaluation.reports.reported import open_reported;"
        "print(test_figures.digests(open_reported(sys.argv[1]).runs))"
    )
    here = str(Path(__file__).parent)
    child = [sys.executable, "-c", f"import sys; sys.path.insert(0, {here!r}); {code}", str(tmp_path / "run")]
    other = subprocess.run(child, check=True, capture_output=True, text=True).stdout.strip()
    before = dict(matplotlib.rcParams)
    assert str(digests(open_reported(tmp_path / "run").runs)) == other
    with matplotlib.rc_context({"font.size": 30, "axes.ymargin": 0.4, "svg.fonttype": "path"}):
        assert str(digests(open_reported(tmp_path / "run").runs)) == other
    assert dict(matplotlib.rcParams) == before


def test_no_global_figures(tmp_path):
    keep(tmp_path / "run", big_tokens(n=500))
    code = (
        "import sys; from gpuxent.evaluation.reports.reported import open_reported;"
        "from gpuxent.evaluation.reports.figures import chosen, figure;"
        "found = chosen.figures(open_reported(sys.argv[1]).runs);"
        "assert 'matplotlib' not in sys.modules;"  # data and words need none
        "figure.to_png(found[0]); figure.to_svg(found[1]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=True)


def test_without_matplotlib(big, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"figures need matplotlib: pip install 'gpuxent\[report\]'"):
        to_png(figures([big])[0])


# ---- odd runs ----

ODD = {
    "one token": ([1.5], None, 1),
    "one document": ([1.0, 2.0, 4.0], [7, 7, 7], 1),
    "equal losses": ([2.0] * 40, [*range(4)] * 10, 0),
    "zeros": ([0.0] * 30 + [1e-300], None, 0),
    "infinite": ([math.inf] * 30, [1] * 15 + [2] * 15, 0),
    "some infinite": ([1.0, math.inf, 2.0, 3.0, math.inf] * 9, [1, 1, 2, 3, 3] * 9, 0),
    "NaN": ([1.0, math.nan, 2.0, 3.0, 0.5] * 9, [1, 1, 2, 3, 4] * 9, 0),
    "only NaN": ([math.nan] * 3, [1, 2, 3], 0),
    "huge": ([1e200, 1e200, 3.0, 1e-300], [1, 1, 2, 2], 0),
    "tiny": ([1e-9, 2e-12, 3e-15] * 10, None, 0),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_runs(tmp_path, case):
    nll, documents, ignored = ODD[case]
    runs = one_run(tmp_path, nll, documents, ignored=ignored)
    infinite, nan = np.isinf(nll).sum(), np.isnan(nll).sum()
    for figure in figures(runs):
        if infinite:
            assert f"{infinite} tokens have an infinite loss." in figure.description
        if nan:
            assert f"{nan} tokens have a loss of NaN." in figure.description
        check_for_page(to_html_svg(figure), figure)
    found = by_name(runs)
    assert ("documents" in found) == (documents is not None and np.isfinite(nll).any())
    assert ("losses" in found) == (np.isfinite(nll) & (np.array(nll) > 2**-60)).any()
    assert ("reliability" in found) == (not np.isnan(nll).all())


def test_odd_runs_beside_each_other(tmp_path):
    runs = []
    for case, (nll, documents, ignored) in ODD.items():
        runs += one_run(tmp_path, nll, documents, ignored=ignored, name=case)
    found = figures(runs)
    assert [figure.name for figure in found] == list(NAMES[:-1])
    for figure in found:
        check_for_page(to_html_svg(figure), figure)
    assert "only NaN: NaN nats per token." in found[0].description
    assert "one token: 1.5 nats per token." in found[0].description


def test_documents_with_a_mark_say_their_numbers(tmp_path):
    """And those without a finite mean have no mark."""
    nll, documents, _ = ODD["NaN"]
    svg = to_html_svg(by_name(one_run(tmp_path, nll, documents))["documents"])
    tips = [title.text for title in ElementTree.fromstring(svg.encode()).iter(f"{SVG}title")][1:]
    assert [re.match(r"run\ndocument (\d)", tip)[1] for tip in tips] == ["4", "2", "3"]


def test_the_largest_loss_there_is(tmp_path):
    runs = one_run(tmp_path, [1.0, sys.float_info.max], kept=False)
    upper, count = numbers(by_name(runs)["losses"], "upper", "tokens")
    assert (upper[-1], count[0], count[-1]) == (sys.float_info.max, 1, 1)


def test_infinite_losses_are_left_out_of_the_running_mean(tmp_path):
    nll, documents, _ = ODD["some infinite"]
    (run,) = one_run(tmp_path, nll, documents)
    finite = np.array(nll)[np.isfinite(nll)]
    assert run.running.tokens[-1] == finite.size
    assert run.running.mean[-1] == pytest.approx(finite.mean())
    assert "27 tokens with a finite loss" in by_name([run])["running"].description
    assert run.result.cross_entropy == math.inf
    assert "inf" in texts(to_svg(by_name([run, replace(run, name="b")])["headline"]))


def test_nan_rows_have_no_intervals(tmp_path):
    nll, documents, _ = ODD["NaN"]
    (run,) = one_run(tmp_path, nll, documents)
    assert run.reliability is None
    assert run.why_no_reliability == "9 rows have a loss of NaN, first row 1"
    figure = by_name([run])["reliability"]
    assert f"There are no intervals: {run.why_no_reliability}." in figure.description
    low, count = numbers(figure, "accuracy_low", "tokens")
    assert np.isnan(low).all()
    assert count.sum() == 36


def test_too_many_to_resample(tmp_path, monkeypatch):
    monkeypatch.setattr(reported, "MOST_FORECASTS", 10)
    (run,) = one_run(tmp_path, [1.0] * 11)
    assert run.reliability is None
    assert run.why_no_reliability == "11 tokens are too many to resample"


def test_partial_run(tmp_path):
    (run,) = open_reported(keep(tmp_path / "run", BIG, rows=7000)).runs
    assert not run.complete
    assert run.result.share == 6000 / 7000
    assert run.reliability is not None
    for figure in figures([run]):
        assert "Partial: 85.7 % of the rows are done." in figure.description


def test_run_without_record_of_tokens(tmp_path):
    tokens = tokens_of(np.linspace(0.1, 5, 60), [*range(6)] * 10)
    (run,) = open_reported(keep(tmp_path / "run", tokens, kept=False)).runs
    assert (run.running, run.document_stderr, run.reliability) == (None, None, None)
    found = by_name([run])
    assert set(found) == {"reliability", "losses", "positions", "documents"}
    assert "the run kept no tokens" in found["reliability"].description


def test_thousands_of_documents(tmp_path):
    rng = np.random.default_rng(0)
    documents = np.arange(40_000) // 4
    (run,) = open_reported(keep(tmp_path / "run", tokens_of(rng.gamma(2, 2, 40_000), documents))).runs
    figure = by_name([run])["documents"]
    assert len(figure.columns["document"]) == 10_000
    assert len(to_html_svg(figure)) < 100_000


# ---- folders ----


def test_names_are_short_and_unique(tmp_path):
    paths = [keep(tmp_path / name, tokens_of([1.0, 2.0])) for name in ("a/x/run", "b/x/run", "a/other")]
    assert [run.name for run in open_reported(paths).runs] == ["a/x/run", "b/x/run", "other"]
    with pytest.raises(ValueError, match=r"runs must be different folders, got .*a/x/\.\./x/run twice"):
        open_reported([paths[0], tmp_path / "a/x/../x/run"])
    with pytest.raises(ValueError, match="runs must be one folder at least, got none"):
        open_reported([])


def test_folders_that_hold_no_run(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("empty", "file", "missing"):
        with pytest.raises(FileNotFoundError, match=f"{name} holds no run"):
            open_reported(tmp_path / name)
    with pytest.raises(ValueError, match=r"none holds no scored token to report: 0 of 9 rows are done"):
        open_reported(keep(tmp_path / "none", tokens_of([]), rows=9))


def test_damaged_folders(tmp_path):
    folder = keep(tmp_path / "run", tokens_of([1.0, 2.0] * 50))
    (folder / "result.json").write_text('{"scored": 100, "groups": [{"x": 1}]}')
    with pytest.raises(ValueError, match=r"result\.json is damaged"):
        open_reported(folder)
    for text in ("{", "[1]"):
        (folder / "result.json").write_text(text)
        with pytest.raises(ValueError, match=r"result\.json is damaged"):
            open_reported(folder)
    (folder / "result.json").unlink()
    (part,) = (folder / "tokens").iterdir()
    whole = part.read_bytes()
    part.write_bytes(whole[:50])
    with pytest.raises(ValueError, match=r"\.parquet cannot be read"):
        open_reported(folder)
    part.unlink()
    with pytest.raises(ValueError, match=r"\.parquet cannot be read"):
        open_reported(folder)
    part.write_bytes(whole)
    assert open_reported(folder).runs[0].result.scored == 100
    data = (folder / "ledger.sqlite").read_bytes()
    (folder / "ledger.sqlite").write_bytes(b"x" * len(data))
    with pytest.raises(ValueError, match=r"ledger\.sqlite is damaged"):
        open_reported(folder)


def test_run_of_another_kind(tmp_path):
    what = {"format": 1, "gpuxent": "0.5", "sources": {}, "options": {"other": 1}}
    with RunDirectory(tmp_path / "run", what, 5, tokens=False):
        pass
    with pytest.raises(ValueError, match=r"run holds no run of perplexity that can be read: KeyError\('topk'\)"):
        open_reported(tmp_path / "run")


def test_result_of_other_tokens_is_not_used(tmp_path):
    folder = keep(tmp_path / "run", tokens_of([1.0, 2.0] * 50))
    (folder / "result.json").write_text('{"scored": 99, "bits_per_byte": 1.5}')
    assert open_reported(folder).runs[0].result.bits_per_byte is None
    (folder / "result.json").write_text('{"scored": 100, "bits_per_byte": 1.5}')
    assert open_reported(folder).runs[0].result.bits_per_byte == 1.5


# ---- command line ----


def plot(*arguments):
    from typer.testing import CliRunner

    from gpuxent.cli import app

    return CliRunner().invoke(app, ["plot", *map(str, arguments)])


def test_plot(tmp_path):
    runs = [keep(tmp_path / name, big_tokens(n=300, seed=i)) for i, name in enumerate("ab")]
    out = tmp_path / "new" / "folder"
    done = plot(*runs, "-o", out, "--figure", "losses", "--figure", "headline", "--format", "csv,svg,csv")
    assert done.exit_code == 0, done.stderr
    expected = [out / f"{name}.{form}" for name in ("losses", "headline") for form in ("csv", "svg")]
    assert done.stdout.splitlines() == [str(path) for path in expected]
    assert sorted(out.iterdir()) == sorted(expected)
    made = by_name(open_reported(runs).runs)
    assert (out / "losses.csv").read_text() == to_csv(made["losses"])
    assert (out / "headline.svg").read_text() == to_svg(made["headline"])
    (out / "losses.csv").write_text("mine")
    again = plot(*runs, "-o", out, "--format", "csv")
    assert again.exit_code == 3
    assert again.stderr == f"gpuxent: {out / 'headline.csv'} exists; --overwrite replaces it\n"
    assert (out / "losses.csv").read_text() == "mine"
    assert not (out / "running.csv").exists()
    assert plot(*runs, "-o", out, "--format", "csv,png", "--overwrite").exit_code == 0
    assert (out / "losses.csv").read_text() == to_csv(made["losses"])
    assert (out / "running.png").read_bytes() == to_png(made["running"])


def test_plot_errors(tmp_path):
    run = keep(tmp_path / "run", tokens_of([1.0, 2.0, 3.0]))
    for arguments, message in (
        ((run, "-o", tmp_path / "o", "--format", "pdf"), "--format must be of png, svg, csv, got 'pdf'"),
        ((run, "-o", tmp_path / "o", "--figure", "pie"), f"--figure must be of {', '.join(NAMES)}, got 'pie'"),
        (
            (run, "-o", tmp_path / "o", "--figure", "documents"),
            "there is nothing to show in --figure documents: these runs give reliability, losses, positions, running",
        ),
        ((tmp_path, "-o", tmp_path / "o"), f"{tmp_path} holds no run: there is no ledger.sqlite"),
        ((run, "-o", run / "ledger.sqlite"), f"--output must be a folder, got the file {run / 'ledger.sqlite'}"),
    ):
        done = plot(*arguments)
        assert (done.exit_code, done.stderr.replace("\n", " ").strip()) == (3, f"gpuxent: {message}")
        assert not (tmp_path / "o").exists()
    assert plot(run).exit_code == 2
    assert plot("-o", tmp_path / "o").exit_code == 2


def test_figures_are_plain_records():
    figure = Figure("x", "X", "an x", {"a": [1, 2], "b": [0.1, math.inf]}, lambda drawing: None)
    assert to_csv(figure) == "a,b\n1,0.1\n2,inf\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_svg(figure)
