"""The HTML report, in a browser."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from browser import browser, needs_chromium, page_of
from typer.testing import CliRunner

import gpuxent as gx
from gpuxent.cli import app

HOSTILE = "<script>alert(1)</script>"
WORDS = [
    "the", "cat", HOSTILE, '"><img src=x onerror=alert(2)>', "</script><script>alert(3)</script>", "{{7*7}}", "$x_1$",
    "שלום", "🙂", "a\u2028b", "&amp;", "İstanbul", "--><b>", "JavaScript:alert(4)", " ", "",
]  # fmt: skip
LENGTHS = (40, 700, 1, 300, 60)
NAMES = ["alpha", HOSTILE, "gamma", "δelta & co", "it's"]


def data(seed=0):
    """(logits, labels, document ids) of a model that knows something; some rows do not count."""
    rng = np.random.default_rng(7)
    count = sum(LENGTHS)
    labels = rng.integers(0, len(WORDS), count)
    logits = 2 * np.random.default_rng(seed).standard_normal((count, len(WORDS)))
    logits[np.arange(count), labels] += 2
    labels[100:103] = -100
    return logits, labels, np.repeat(np.arange(len(LENGTHS)), LENGTHS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("base", 0), ("other", 1)):
        logits, labels, documents = data(seed)
        gx.evaluate(logits, labels, documents=documents, run=folder / name)
    (folder / "words.txt").write_text("".join(f"{word}\n" for word in WORDS), encoding="utf-8")
    (folder / "names.txt").write_text("".join(f"{name}\n" for name in NAMES), encoding="utf-8")
    return folder


def report(output, *runs, exit_code=0, **options):
    arguments = [str(run) for run in runs] + ["-o", str(output)]
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    result = CliRunner().invoke(app, ["report", *arguments])
    assert result.exit_code == exit_code, result.output
    return result


@pytest.fixture(scope="module")
def path(runs):
    report(
        runs / "report.html",
        runs / "base",
        runs / "other",
        vocabulary=runs / "words.txt",
        document_names=runs / "names.txt",
        title=f"Title {HOSTILE}",
    )
    return runs / "report.html"


@pytest.fixture(scope="module")
def short(runs, path):
    """The same with few tokens."""
    words = {"vocabulary": runs / "words.txt", "document_names": runs / "names.txt"}
    report(runs / "short.html", runs / "base", runs / "other", tokens=150, **words)
    return runs / "short.html"


@pytest.fixture(scope="module")
def chromium():
    with browser() as running:
        yield running


def shown_tokens(page):
    return page.locator("#tokens article:not([hidden]) .t:not(.dim)").count()


def found(page):
    return page.locator("#found").inner_text()


def tokens_of(run):
    from gpuxent.evaluation.runs.directory import read_tokens
    from gpuxent.evaluation.statistics.tokens import Tokens

    return Tokens.concatenated(list(read_tokens(run)))


# ---- the file ----


def test_the_report_holds_the_numbers_of_its_runs(path, runs):
    text = path.read_text(encoding="utf-8")
    for name in ("base", "other"):
        result = json.loads((runs / name / "result.json").read_text())
        for value in ("cross_entropy", "perplexity"):
            assert f'<dd class="value">{result[value]:.6g}</dd>' in text
        half = 1.959964 * result["stderr_cluster"]
        low, high = result["cross_entropy"] - half, result["cross_entropy"] + half
        assert f"{low:.5g} to {high:.5g}, by document" in text
        assert f"{math.exp(low):.5g} to {math.exp(high):.5g}, by document" in text
        assert f'<dd class="value">{100 * result["accuracy"]:.2f} %</dd>' in text


def test_the_same_runs_give_the_same_bytes(path, runs, tmp_path):
    names = {"vocabulary": runs / "words.txt", "document_names": runs / "names.txt"}
    report(tmp_path / "again.html", runs / "base", runs / "other", title=f"Title {HOSTILE}", **names)
    assert (tmp_path / "again.html").read_bytes() == path.read_bytes()


def test_markup_in_data_stays_text(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("<script") == 2  # the data and the program
    assert "<img" not in text
    assert "<b>" not in re.sub(r'<b id="least-shown">', "", text)


# ---- in a browser ----


@needs_chromium
def test_nothing_is_asked_of_the_network_and_nothing_hostile_runs(chromium, path):
    with page_of(chromium, path) as page:
        assert page.title() == f"Title {HOSTILE}"
        assert page.locator("h1").inner_text() == f"Title {HOSTILE}"
        assert page.locator("#documents td", has_text=HOSTILE).count() == 1
        assert page.locator("img").count() == 0
        for order in ("single", "largest", "token", "text"):
            page.select_option("#order", order)
        page.locator(".t", has_text=HOSTILE).first.hover()
        assert HOSTILE in page.locator("#tip").inner_text()


@needs_chromium
def test_every_scored_token_is_there_with_its_numbers(chromium, path, runs):
    tokens, other = tokens_of(runs / "base"), tokens_of(runs / "other")
    with page_of(chromium, path) as page:
        assert page.locator(".t").count() == len(tokens)
        texts = page.eval_on_selector_all(".t", "all => all.map(one => one.textContent)")
        assert texts == [WORDS[label] if WORDS[label] else "·" for label in tokens.label]
        place = 345
        page.locator(".t").nth(place).hover()
        tip = page.locator("#tip").inner_text()
        for column in (tokens, other):
            assert f"{column.nll[place]:.3f}" in tip
            assert f"{100 * np.exp(-column.nll[place]):.2f} %" in tip
            assert f"{100 * column.p_max[place]:.2f} %" in tip
        ranks = page.locator("#tip td:nth-child(4)").all_inner_texts()
        assert ranks == [str(column.rank[place] + 1) for column in (tokens, other)]
        assert f"row {tokens.row[place]:,}, position {tokens.position[place]:,}" in tip


@needs_chromium
def test_rows_that_do_not_count_leave_a_gap(chromium, path):
    with page_of(chromium, path) as page:
        assert page.locator(".gap").count() == 1
        assert page.evaluate("document.querySelector('.gap').nextElementSibling.dataset.i") == "100"


@needs_chromium
def test_colours_tell_the_loss_and_the_difference(chromium, path, runs):
    base, other = tokens_of(runs / "base").nll, tokens_of(runs / "other").nll
    strengths = "all => all.map(one => Number(one.style.getPropertyValue('--s')))"
    better = "all => all.map(one => one.classList.contains('better'))"
    with page_of(chromium, path) as page:
        np.testing.assert_allclose(page.eval_on_selector_all(".t", strengths), np.minimum(base / 10, 1), atol=0.006)
        page.select_option("#model", label="other \u2212 base")
        change = np.minimum(np.abs(other - base) / 4, 1)
        np.testing.assert_allclose(page.eval_on_selector_all(".t", strengths), change, atol=0.006)
        assert page.eval_on_selector_all(".t", better) == (other < base).tolist()


@needs_chromium
def test_tokens_are_filtered_by_their_loss(chromium, path, runs):
    nll = tokens_of(runs / "base").nll
    with page_of(chromium, path) as page:
        assert found(page) == f"{nll.size:,} tokens"
        page.locator("#least").fill("3.25")
        assert found(page) == f"{np.count_nonzero(nll >= 3.25):,} tokens"
        assert shown_tokens(page) == np.count_nonzero(nll >= 3.25)
        page.locator("#least").fill("15")
        assert page.locator("#tokens article:not([hidden])").count() == 0


@needs_chromium
def test_search_finds_words_also_across_tokens_and_documents(chromium, path, runs):
    tokens = tokens_of(runs / "base")
    with page_of(chromium, path) as page:
        page.locator("#search").fill("CAT")
        assert found(page) == f"{np.count_nonzero(tokens.label == 1):,} tokens match"
        assert set(page.locator(".t.hit").all_text_contents()) == {"cat"}
        pairs = np.flatnonzero((tokens.label[:-1] == 0) & (tokens.label[1:] == 1))
        pairs = [i for i in pairs if tokens.document[i] == tokens.document[i + 1]]
        page.locator("#search").fill("the cat")
        assert found(page) == f"{2 * len(pairs):,} tokens match"
        page.locator("#search").press("Enter")
        assert page.locator(".t.current").get_attribute("data-i") == str(pairs[0])
        page.locator("#search").fill("javascript")
        assert found(page) == f"{np.count_nonzero(tokens.label == WORDS.index('JavaScript:alert(4)')):,} tokens match"
        page.locator("#search").fill("δelta")
        assert page.locator("#tokens article:not([hidden]) h3").all_inner_texts()[0].startswith("δelta & co")
        assert page.locator("#tokens article:not([hidden])").count() == 1
        page.locator("#search").fill("nowhere")
        assert found(page) == "0 tokens match"
        assert page.locator("#tokens article:not([hidden])").count() == 0


@needs_chromium
def test_stretches_and_tokens_are_sorted(chromium, path, runs):
    tokens = tokens_of(runs / "base")
    means = [tokens.nll[tokens.document == d].mean() for d in range(len(LENGTHS))]
    most = [tokens.nll[tokens.document == d].max() for d in range(len(LENGTHS))]
    with page_of(chromium, path) as page:

        def order():
            firsts = page.eval_on_selector_all(
                "article .t:first-of-type", "all => all.map(one => Number(one.dataset.i))"
            )
            return tokens.document[firsts].tolist()

        for name, key in (("largest", np.negative(means)), ("smallest", means), ("token", np.negative(most))):
            page.select_option("#order", name)
            assert order() == np.argsort(key).tolist()
        page.select_option("#order", "text")
        assert order() == list(range(len(LENGTHS)))
        page.select_option("#order", "single")
        shown = page.locator("#single tbody td:first-child").all_inner_texts()
        assert shown == [f"{nll:.3f}" if nll < 10 else f"{nll:.2f}" for nll in np.sort(tokens.nll)[::-1][:200]]
        page.locator("#single tbody button").first.click()
        assert page.locator(".t.current").get_attribute("data-i") == str(np.argmax(tokens.nll))


@needs_chromium
def test_the_keyboard_goes_from_token_to_token(chromium, path):
    with page_of(chromium, path) as page:
        page.locator("#tokens").focus()
        current = page.locator(".t.current")
        for key, place in (("ArrowRight", "0"), ("ArrowRight", "1"), ("ArrowLeft", "0"), ("ArrowLeft", "1097")):
            page.keyboard.press(key)
            assert current.get_attribute("data-i") == place
            assert page.locator("#tip").is_visible()
        page.keyboard.press("Escape")
        assert current.count() == 0
        assert page.locator("#tip").is_hidden()


@needs_chromium
def test_documents_are_sorted_by_any_column(chromium, path, runs):
    tokens = tokens_of(runs / "base")
    means = {NAMES[d]: tokens.nll[tokens.document == d].mean() for d in range(len(LENGTHS))}
    with page_of(chromium, path) as page:
        table = page.locator("#documents table")
        first = table.locator("tbody td:first-child")
        assert first.all_inner_texts() == sorted(means, key=lambda name: -means[name])
        table.get_by_role("button", name="cross-entropy").click()
        assert first.all_inner_texts() == sorted(means, key=lambda name: means[name])
        table.get_by_role("button", name="tokens").click()
        assert table.locator("tbody td:nth-child(2)").all_inner_texts() == ["697", "300", "60", "40", "1"]
        table.get_by_role("button", name="document").click()
        table.get_by_role("button", name="document").click()
        assert first.all_inner_texts()[-1] == "δelta & co"
        assert table.locator("th[aria-sort=ascending]").inner_text().startswith("document")


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_it_is_accessible_in_light_and_dark_and_fits_a_phone(chromium, short, scheme, width):
    from axe_playwright_python.sync_playwright import Axe

    with page_of(chromium, short, color_scheme=scheme, viewport={"width": width, "height": 800}) as page:
        page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
        page.locator(".t").nth(5).hover()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        violations = Axe().run(page).response["violations"]
        assert [(v["id"], v["nodes"][0]["html"][:200], len(v["nodes"])) for v in violations] == []


@needs_chromium
def test_it_prints(chromium, path):
    with page_of(chromium, path, color_scheme="dark") as page:
        page.emulate_media(media="print")
        assert page.locator("nav").is_hidden()
        assert page.locator(".controls").is_hidden()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.pdf().startswith(b"%PDF")


@needs_chromium
def test_thousands_of_tokens_are_soon_there(chromium, tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 50, 30_000)
    gx.evaluate(rng.standard_normal((labels.size, 50)), labels, run=tmp_path / "run")
    report(tmp_path / "long.html", tmp_path / "run", tokens=30_000)
    with page_of(chromium, tmp_path / "long.html") as page:
        assert page.locator(".t").count() == 30_000
        page.locator("#search").fill("17")
        assert found(page) == f"{np.count_nonzero(labels == 17):,} tokens match"
        # Only what is near the window is laid out.
        assert page.evaluate("getComputedStyle(document.querySelector('#tokens article')).contentVisibility") == "auto"


# ---- comparisons ----


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    (base, labels, documents), (other, *_) = data(0), data(1)
    gx.compare(base, other, labels, documents=documents, run=folder / "comparison")
    return folder / "comparison"


def test_a_comparison_is_reported_with_its_verdict_and_intervals(comparison, runs, tmp_path):
    report(tmp_path / "r.html", comparison, document_names=runs / "names.txt")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    result = json.loads((comparison / "result.json").read_text())
    change = result["log_ratio"]
    assert f"by {abs(change['value']):.6g} nats per token" in text
    low, high = (change["value"] + side * 1.959964 * change["stderr_cluster"] for side in (-1, 1))
    assert f"{low:.5g} to {high:.5g}, by document" in text
    assert f'<dd class="value">{result["kl"]["value"]:.5g}</dd>' in text
    assert 'id="figure-kld-' in text
    assert "it&#39;s" in text  # a document's name in a table


@needs_chromium
def test_the_text_of_a_comparison_has_both_sides(chromium, comparison, runs, tmp_path):
    report(tmp_path / "r.html", comparison, runs / "other")
    base, other = tokens_of(runs / "base").nll, tokens_of(runs / "other").nll
    with page_of(chromium, tmp_path / "r.html") as page:
        names = ["other", "comparison: base", "comparison: other"]
        assert page.locator("#model option").all_inner_texts()[:3] == names
        page.locator(".t").nth(7).hover()
        shown = page.locator("#tip td:nth-child(2)").all_inner_texts()
        assert shown == [f"{nll[7]:.3f}" for nll in (other, base, other)]


# ---- odd runs ----


def test_losses_that_are_no_numbers_are_shown_as_such(tmp_path):
    logits = np.zeros((4, 3))
    logits[1, 0] = -np.inf
    logits[2] = np.nan
    gx.evaluate(logits, np.array([1, 0, 1, 2]), run=tmp_path / "run")
    report(tmp_path / "r.html", tmp_path / "run")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "1 row has a loss of NaN, first row 2" in text
    assert '"nll": [[1.099, "Infinity", "NaN", 1.099]]' in text


def test_a_run_without_documents_has_no_table_of_them(tmp_path):
    logits, labels, _ = data()
    gx.evaluate(logits, labels, run=tmp_path / "run")
    report(tmp_path / "r.html", tmp_path / "run")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert 'id="documents"' not in text
    assert '#documents"' not in text
    assert ", independent tokens" in text


def test_few_of_many_tokens_and_documents_are_shown_and_it_says_so(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 4000)
    documents = np.arange(4000) // 2
    gx.evaluate(rng.standard_normal((4000, 3)), labels, documents=documents, run=tmp_path / "run")
    report(tmp_path / "r.html", tmp_path / "run", tokens=100)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "The 1,000 of 2,000 with the largest mean loss." in text
    assert "100 of 4,000 tokens, in whole stretches" in text
    assert len(json.loads(re.search(r'id="text-data" type="application/json">(.*?)</script>', text)[1])["text"]) == 100


def test_runs_on_other_tokens_are_named(tmp_path):
    logits, labels, _ = data()
    gx.evaluate(logits, labels, run=tmp_path / "a")
    gx.evaluate(logits[:50], labels[:50], run=tmp_path / "b")
    report(tmp_path / "r.html", tmp_path / "a", tmp_path / "b")
    assert "b is not among the models here: it scored other tokens" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_bad_input_is_an_error_and_writes_nothing(runs, tmp_path):
    output = tmp_path / "r.html"
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    for arguments, options, message in (
        ([tmp_path / "none"], {}, "none"),
        ([runs / "base"], {"vocabulary": tmp_path / "few.txt"}, "has 2 tokens, but a label is 15"),
        ([runs / "base"], {"vocabulary": tmp_path / "missing.txt"}, "missing.txt"),
        ([runs / "base"], {"document_names": tmp_path / "missing.txt"}, "missing.txt"),
    ):
        assert message in report(output, *arguments, exit_code=3, **options).output
        assert not output.exists()
    output.write_text("precious")
    assert "is there already; --overwrite replaces it" in report(output, runs / "base", exit_code=3).output
    assert output.read_text() == "precious"
    report(output, runs / "base", overwrite=True)
    assert output.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_the_file_lies_where_it_was_asked_for(runs, tmp_path):
    assert "r.html: " in report(tmp_path / "r.html", runs / "base").output
    assert Path(tmp_path / "r.html").stat().st_size > 10_000
