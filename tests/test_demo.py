"""The demonstration: its corpus, its model, and the whole of it on a small text."""

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from gpuxent.calibration import check_temperature
from gpuxent.evaluation.demo import corpus as demo_corpus
from gpuxent.evaluation.demo import demonstrate as demo
from gpuxent.evaluation.demo import report as demo_report
from gpuxent.evaluation.demo.corpus import (
    UNKNOWN,
    build_corpus,
    gather_paragraphs,
    text_corpus,
    tokenize,
    without_repeats,
)
from gpuxent.evaluation.demo.model import LogBilinear, Settings, log_unigram, sum_by_row, train
from gpuxent.evaluation.demo.report import most_surprising, words_before
from gpuxent.evaluation.statistics.documents import Document

TINY = Settings(dimension=16, context=2, epochs=3, batch=64, warmup=10)


def story(paragraphs, seed=0):
    """Sentences of a few words in which the last word tells the next: easy for a model with context."""
    rng = np.random.default_rng(seed)
    pairs = [("red", "fox"), ("old", "owl"), ("wet", "cat"), ("big", "bear"), ("sly", "crow")]
    sentences = [" ".join(["the", *pairs[i], "ran", "."]) for i in rng.integers(len(pairs), size=60 * paragraphs)]
    return "\n\n".join(" ".join(sentences[60 * i : 60 * (i + 1)]) for i in range(paragraphs))


@pytest.fixture
def corpus():
    documents = [(f"doc {i}", story(2, seed=i)) for i in range(3)] + [("one", "alone"), ("short", "Hapax lonely the")]
    return build_corpus("stories", documents)


def recorder(width=80):
    return Console(file=io.StringIO(), width=width)


# ---- corpus ----


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Don't panic!", ["don't", "panic", "!"]),
        (">>> x_1 == 2.5", [">>>", "x_1", "==", "2", ".", "5"]),
        ("(a)... -- 'Ü'", ["(", "a", ")", "...", "--", "'", "ü", "'"]),
        (" \n\t", []),
    ],
)
def test_tokens_are_words_and_runs_of_punctuation(text, tokens):
    assert tokenize(text) == tokens


def test_the_end_of_every_document_is_held_out(corpus):
    assert corpus.names == ["doc 0", "doc 1", "doc 2", "short"]  # a document of one token has nothing to learn from
    for i in range(len(corpus.names)):
        held = corpus.held_out[corpus.document == i]
        count = max(1, round(0.1 * held.size))
        assert held[-count:].all()
        assert not held[:-count].any()


def test_the_vocabulary_knows_nothing_of_held_out_words():
    words = ["often"] * 900 + ["once"] + ["late"] * 100  # "late" is in the last tenth of 1001 only
    corpus = build_corpus("counted", [("d", " ".join(words))])
    assert corpus.vocab == [UNKNOWN, "often"]
    assert corpus.tokens.tolist() == [1] * 900 + [0] * 101


def test_frequent_words_come_first_and_equals_by_alphabet():
    assert demo_corpus.build_vocab(list("bbbccaax")) == [UNKNOWN, "b", "a", "c"]


def test_contexts_are_the_words_before_in_the_same_document(corpus):
    places = np.arange(len(corpus.tokens))
    contexts = corpus.contexts(places, 3)
    for place in places:
        for k in range(3):
            before = place - k - 1
            same = before >= 0 and corpus.document[before] == corpus.document[place]
            assert contexts[place, k] == (corpus.tokens[before] if same else corpus.padding)
    assert corpus.padding == len(corpus.vocab)  # no class


def test_contexts_of_some_places_are_those_of_all(corpus):
    places = np.flatnonzero(corpus.held_out)
    np.testing.assert_array_equal(corpus.contexts(places, 4), corpus.contexts(np.arange(len(corpus.tokens)), 4)[places])


def test_more_text_than_the_bound_is_cut(monkeypatch):
    monkeypatch.setattr(demo_corpus, "MAX_TOKENS", 1200)
    documents = ((f"d{i}", "a b " * 250) for i in range(1000))
    corpus = build_corpus("long", documents)
    assert len(corpus.words) == 1200
    assert corpus.names == ["d0", "d1", "d2"]
    assert corpus.cut
    assert next(documents)[0] == "d3"  # and what comes after it is not even read


def test_text_of_just_the_bound_is_not_cut(monkeypatch):
    monkeypatch.setattr(demo_corpus, "MAX_TOKENS", 1000)
    assert not build_corpus("exact", [("d", "a b " * 500)]).cut


def test_paragraphs_are_gathered_to_documents():
    paragraph = "word " * 90
    documents = list(gather_paragraphs("\n \n".join([f"Number {i}\n{paragraph}" for i in range(8)])))
    sizes = [len(tokenize(text)) for _, text in documents]
    assert sizes == [3 * 92, 5 * 92]  # the rest is too short for a document of its own
    assert documents[0][0] == "0: Number 0 word word word"
    assert "Number 7" in documents[1][1]


def test_a_repeated_paragraph_stays_in_the_shortest_document():
    documents = {"long": "a b c\n\nown words\n\nown words", "short": "a b c\n\nd"}
    assert without_repeats(documents) == {"long": "own words\n\nown words", "short": "a b c\n\nd"}


def test_no_paragraph_of_the_reference_is_both_learned_and_held_out():
    corpus = demo_corpus.reference_corpus()
    assert len(corpus.names) > 50
    training = [
        " ".join(np.array(corpus.words)[(corpus.document == i) & ~corpus.held_out]) for i in range(len(corpus.names))
    ]
    learned = "\n".join(training)
    repeated = 0
    for i in range(len(corpus.names)):
        held = np.array(corpus.words)[(corpus.document == i) & corpus.held_out]
        runs = [" ".join(held[j : j + 30]) for j in range(0, len(held) - 29, 30)]
        repeated += sum(run in learned for run in runs)
    assert repeated <= 3  # of about 200 runs of 30 tokens; with the repeats left in, dozens


# ---- bad text ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"text\.txt has 0 words"),
        (b"a few words only, and a few more", r"text\.txt has 9 words and punctuation marks; at least 1,000"),
        (b"latin \xe9t\xe9", r"text\.txt is not UTF-8 text: .* at byte 6"),
        (" ".join(f"w{i}" for i in range(1200)).encode(), r"text\.txt has no word that occurs 2 times"),
    ],
)
def test_text_that_cannot_serve_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        text_corpus(path)


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + story(6).replace("\n", "\r\n").encode())
    corpus = text_corpus(path)
    assert len(corpus.names) == 6
    assert corpus.names[0].startswith("0: the ")


# ---- model ----


def float64_model(vocab, settings, seed=0):
    rng = np.random.default_rng(seed)
    model = LogBilinear.create(rng.normal(size=vocab), settings, rng)
    model.embedding += rng.normal(0, 0.5, model.embedding.shape)
    return model, rng


def test_gradient_agrees_with_finite_differences():
    settings = Settings(dimension=4, context=3)
    model, rng = float64_model(7, settings)
    contexts, labels = rng.integers(8, size=(9, 3)), rng.integers(7, size=9)
    mask = 2.0 * (rng.random((9, 12)) < 0.5)
    _, gradients = model.loss_and_grad(contexts, labels, mask)
    assert gradients.keys() == vars(model).keys()
    for name, value in vars(model).items():
        numeric = np.empty_like(value)
        for at in np.ndindex(value.shape):
            kept = value[at]
            ends = []
            for move in (1e-5, -1e-5):
                value[at] = kept + move
                ends.append(model.loss_and_grad(contexts, labels, mask)[0])
            value[at] = kept
            numeric[at] = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(gradients[name], numeric, rtol=1e-6, atol=1e-9, err_msg=name)


def test_logits_are_the_formula():
    settings = Settings(dimension=4, context=3)
    model, rng = float64_model(7, settings)
    contexts = rng.integers(8, size=(5, 3))
    weight = model.position_weight.reshape(3, 4, 4)
    for row, context in zip(model.logits(contexts), contexts, strict=True):
        hidden = sum(model.embedding[word] @ weight[k] for k, word in enumerate(context))
        np.testing.assert_allclose(row, [hidden @ model.embedding[c] + model.bias[c] for c in range(7)], rtol=1e-12)


def test_a_rounded_copy_has_few_weights(corpus):
    model = demo.train_model(corpus, TINY, recorder()).model
    copy = model.rounded(4)
    for name in ("embedding", "position_weight"):
        rows, rounded = getattr(model, name), getattr(copy, name)
        assert rounded.dtype == rows.dtype
        step = np.abs(rows).max(axis=1) / 7
        assert (np.abs(rounded - rows).max(axis=1) <= step * 0.5001).all()
        assert max(np.unique(row).size for row in rounded) <= 15
    assert (model.rounded(20).embedding == 0).sum() == (model.embedding == 0).sum()
    assert LogBilinear(np.zeros((2, 3)), np.ones((3, 3)), np.zeros(1)).rounded(4).embedding.tolist() == [[0.0] * 3] * 2


def test_sum_by_row_is_add_at():
    rng = np.random.default_rng(3)
    values, rows = rng.integers(-5, 5, size=(40, 3)).astype(float), rng.integers(9, size=40)
    expected = np.zeros((11, 3))
    np.add.at(expected, rows, values)
    np.testing.assert_array_equal(sum_by_row(values, rows, 11), expected)


def test_unigram_adds_one_to_each_count():
    np.testing.assert_allclose(np.exp(log_unigram(np.array([0, 0, 2]), 4)), np.array([3, 1, 2, 1]) / 7)


def test_training_beats_the_unigram_on_what_was_held_out(corpus):
    model = demo.train_model(corpus, TINY, recorder()).model
    places = np.flatnonzero(corpus.held_out)
    logits = model.logits(corpus.contexts(places, TINY.context)).astype(np.float64)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(places)), corpus.tokens[places]]
    unigram = demo.baselines(corpus)["unigram, add-one"]
    assert losses.mean() < unigram - 1.0  # ln 5 / 5 is the least there can be: only one word in five is free


def test_training_is_reproducible(corpus):
    one, two = (demo.train_model(corpus, TINY, recorder()).model for _ in range(2))
    np.testing.assert_array_equal(one.embedding, two.embedding)


def test_work_is_bounded_and_reported_step_by_step():
    settings = Settings(dimension=4, context=2, batch=10, epochs=5, max_logits=12 * 10 * 6)
    assert settings.steps(tokens=100, vocab=6) == 12  # not 50
    assert settings.steps(tokens=20, vocab=6) == 10
    rng = np.random.default_rng(0)
    seen = []
    train(
        rng.integers(7, size=(100, 2)), rng.integers(6, size=100), 6, settings, lambda epoch, loss: seen.append(epoch)
    )
    assert seen == [1] * 10 + [2] * 2


def test_training_ends_when_the_time_is_over(corpus):
    trained = demo.train_model(corpus, replace(TINY, max_seconds=0.0), recorder())
    assert (trained.steps, trained.planned) == (1, 75)
    out = recorder(width=1000)
    demo_report.show_training(trained, TINY, out)
    assert "stopped after 1 of 75 steps" in out.file.getvalue()


def test_baselines(corpus):
    training, held = corpus.tokens[~corpus.held_out], corpus.tokens[corpus.held_out]
    vocab = len(corpus.vocab)
    expected = [-math.log(((training == y).sum() + 1) / (len(training) + vocab)) for y in held]
    found = demo.baselines(corpus)
    assert found["unigram, add-one"] == pytest.approx(np.mean(expected), rel=1e-12)
    assert found["uniform"] == pytest.approx(math.log(vocab), rel=1e-12)


# ---- report ----


def test_most_surprising_are_the_largest_losses_without_unknown_words():
    assert most_surprising(np.array([1.0, 9.0, 3.0, 3.0, 2.0]), np.array([4, 0, 2, 1, 3]), 3) == [2, 3, 4]


def test_words_before_stop_at_the_document(corpus):
    start = int(np.searchsorted(corpus.document, 1))
    assert words_before(corpus, start) == ""
    assert words_before(corpus, start + 2) == " ".join(corpus.words[start : start + 2])
    assert len(words_before(corpus, start + 50)) == 26


def test_long_names_leave_room_for_the_numbers():
    out = recorder()
    names = ["n" * 200, "wörter " * 30]
    out.print(demo_report.documents_table("Best", [Document(0, 15_000, 3.0), Document(1, 30, 9.5)], names))
    lines = out.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert re.search(r"n… │ 15,000 │ +3\.0000 │ +20\.09 │", lines[4])
    assert re.search(r"… │ +30 │ +9\.5000 │ +13,359\.73 │", lines[5])


# ---- the whole ----


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(story(12), encoding="utf-8")
    return path


def test_demo_writes_files_that_score_as_it_says(tmp_path, text_file):
    folder = tmp_path / "new" / "folder"
    out, progress = recorder(), recorder()
    demo.run_demo(text_file, folder, out=out, progress=progress, settings=TINY)
    logits, labels, documents = (np.load(folder / name) for name in demo.FILES[:3])
    vocabulary = (folder / "vocabulary.txt").read_text(encoding="utf-8").splitlines()
    names = (folder / "documents.txt").read_text(encoding="utf-8").splitlines()
    assert logits.shape == (360, len(vocabulary))
    assert (logits.dtype, labels.dtype, documents.dtype) == (np.float16, np.int32, np.int32)
    assert len(names) == 12
    np.testing.assert_array_equal(documents, np.repeat(np.arange(12), 30))
    assert [vocabulary[y] for y in labels[:30]] == tokenize(story(12).split("\n\n")[0])[-30:]

    x = logits.astype(np.float64)
    losses = np.log(np.exp(x).sum(axis=1)) - x[np.arange(len(x)), labels]
    text = out.file.getvalue()
    one_line = " ".join(text.split())
    assert f"{losses.mean():.4f}" in text
    assert f"{math.exp(losses.mean()):.2f}" in text
    means = {name: f"{losses[documents == i].mean():.4f}" for i, name in enumerate(names)}
    ranked = sorted(means.values())
    shown = re.findall(r"│ (\d+: .*?) +│ +30 │ +(\d\.\d{4}) │", text)
    assert [loss for _, loss in shown] == ranked[:5] + ranked[:-6:-1]
    assert all(means[name] == loss for name, loss in shown)
    assert f"{losses.max():.2f}" in text
    told = re.search(
        r"to 4 bits, by gpuxent\.compare: cross-entropy ([+-][\d.]+) nats.* KL divergence ([\d.e-]+) nats", one_line
    )
    assert abs(float(told[1])) < 0.5
    assert 0 < float(told[2]) < 0.5
    check = check_temperature(*(folder / name for name in demo.FILES[:2]), documents=documents)
    interval = r"(\S+) \((\S+) to (\S+)\)"
    (said,) = re.findall(
        rf"temperature of ([\d.]+), .* \(ECE, with 95 % intervals\) {interval} -> {interval}, "
        r"cross-entropy (\S+) -> (\S+), on the (\d+) documents",
        one_line,
    )
    eces = [f"{number:.3g}" for ece in (check.before.ece, check.after.ece) for number in (ece.value, ece.low, ece.high)]
    losses_of = [f"{part.nll.value:.4f}" for part in (check.before, check.after)]
    assert list(said) == [f"{check.fit.temperature:.4f}", *eces, *losses_of, str(check.before.documents)]
    assert all(len(line) <= 80 for line in text.splitlines() if str(folder) not in line)
    command = [line.strip() for line in text.splitlines() if "gpuxent perplexity" in line]
    assert command == [demo.command(folder)]
    assert re.search(r"\(100%\), epoch 3, training loss", progress.file.getvalue())


def test_no_temperature_where_there_are_too_few_documents(tmp_path, monkeypatch):
    """The demonstration goes on."""
    np.save(tmp_path / "logits.npy", np.zeros((4, 3)))
    for name in ("labels.npy", "documents.npy"):
        np.save(tmp_path / name, np.zeros(4, int))
    found, out = demo.calibrated(tmp_path), recorder(width=1000)
    demo_report.show_calibration(found, out)
    assert re.search(r"No temperature was fitted: no (row|temperature) .*\.$", out.file.getvalue(), re.MULTILINE)


def test_demo_keeps_only_its_report_by_default(text_file, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    out = recorder(width=1000)
    demo.run_demo(text_file, None, out=out, progress=recorder(), settings=TINY)
    folder = Path(re.search(r"in (/\S+)", out.file.getvalue()).group(1))
    assert folder.parent == tmp_path
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    assert f"{folder / 'report.html'}\n" in out.file.getvalue()
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "owl" in json.loads(re.search(r'type="application/json">(.*?)</script>', page)[1])["strings"]
    assert all(f">{name}<" in page for name in ("model", "rounded"))
    assert "gpuxent perplexity" not in out.file.getvalue()


@pytest.mark.parametrize("missing", ["pyarrow", "matplotlib", "jinja2"])
def test_demo_does_without_a_report_and_says_so(text_file, monkeypatch, tmp_path, missing):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == missing else True)
    out = recorder()
    demo.run_demo(text_file, None, out=out, progress=recorder(), settings=TINY)
    assert list(tmp_path.glob("gpuxent-demo-*")) == []
    assert "With the extra `report` installed" in out.file.getvalue()


def test_demo_overwrites_nothing(text_file, tmp_path):
    mine = tmp_path / "labels.npy"
    mine.write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"already has labels\.npy"):
        demo.run_demo(text_file, tmp_path, out=recorder(), progress=recorder(), settings=TINY)
    assert mine.read_bytes() == b"precious"


def test_markup_in_a_text_is_only_text(tmp_path):
    path = tmp_path / "[bold]story[red].txt"
    path.write_text(story(12).replace("the", "[/red]"), encoding="utf-8")
    out = recorder(width=200)
    demo.run_demo(path, tmp_path / "[red]out", out=out, progress=recorder(), settings=TINY)
    assert "[bold]story[red].txt" in out.file.getvalue()
    assert "[red]out" in out.file.getvalue()
    assert ": [/red] " in out.file.getvalue()  # a document's name
