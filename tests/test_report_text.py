"""Which tokens a report shows, and what they look like."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest

from gpuxent.evaluation.reports import text as module
from gpuxent.evaluation.reports.text import document_name, shown_text, stretches_of, text_data
from gpuxent.evaluation.reports.vocabulary import Numbers, open_vocabulary
from gpuxent.evaluation.statistics.tokens import Tokens

LENGTHS = (30, 2500, 1, 700, 4001)  # of sequences


def record(lengths=LENGTHS, documents=True, seed=0, skip=()):
    """Tokens of sequences one after another, without some rows that do not count."""
    rng = np.random.default_rng(seed)
    count = sum(lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    kept = np.setdiff1d(np.arange(count), skip)
    every = Tokens(
        row=np.arange(count),
        label=rng.integers(0, 50, count),
        position=position,
        nll=rng.exponential(3, count),
        entropy=rng.exponential(3, count),
        p_max=rng.random(count),
        rank=rng.integers(0, 50, count),
        document=np.repeat(np.arange(len(lengths)), lengths) if documents else None,
    )
    return every.take(kept)


def parts(tokens, size):
    return [tokens.take(np.arange(start, min(start + size, len(tokens)))) for start in range(0, len(tokens), size)]


def naive_stretches(tokens):
    """(first row, last row, tokens, loss), a token at a time."""
    found = {}
    for row, position, nll in zip(tokens.row.tolist(), tokens.position.tolist(), tokens.nll.tolist(), strict=True):
        stretch = found.setdefault((row - position, position // 2000), [row, row, 0, 0.0])
        stretch[1], stretch[2], stretch[3] = row, stretch[2] + 1, stretch[3] + nll
    return list(found.values())


@pytest.mark.parametrize("size", [1, 7, 1000, 10**6])
@pytest.mark.parametrize("skip", [(), (0, 30, 31, 2529, 2530, 2531), tuple(range(25, 600))])
def test_stretches_are_those_of_sequences_however_they_are_read(size, skip):
    tokens = record(skip=skip)
    found = stretches_of(parts(tokens, size))
    expected = naive_stretches(tokens)
    np.testing.assert_array_equal(np.stack([found.first, found.last, found.tokens], 1), [e[:3] for e in expected])
    np.testing.assert_allclose(found.loss, [e[3] for e in expected], rtol=1e-12)


def test_a_stretch_ends_with_its_sequence_and_after_so_many_rows():
    found = stretches_of([record()])
    assert found.tokens.tolist() == [30, 2000, 500, 1, 700, 2000, 2000, 1]


def losses(means):
    """A record of sequences of 100 tokens with these mean losses."""
    tokens = record((100,) * len(means))
    nll = np.repeat(np.asarray(means, float), 100)
    return Tokens(**(tokens.columns | {"nll": nll}))


def test_half_of_the_tokens_are_the_worst_stretches_and_half_the_first():
    tokens = losses([1, 2, 9, 3, 8, 7, 1, 1])
    shown = shown_text([("a", lambda: iter(parts(tokens, 64)))], 400)
    assert sorted({row // 100 for row in shown.tokens[0].row.tolist()}) == [0, 1, 2, 4]
    assert shown.scored == 800


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_stretch_without_a_finite_loss_is_among_the_worst(bad):
    shown = shown_text([("a", lambda: iter([losses([1, 2, 3, bad])]))], 200)
    assert sorted({row // 100 for row in shown.tokens[0].row.tolist()}) == [0, 3]


def test_few_tokens_are_not_the_worst_stretch():
    tokens = record((5, 100, 100))
    tokens.nll[:5], tokens.nll[5:105], tokens.nll[105:] = 50.0, 1.0, 2.0
    shown = shown_text([("a", lambda: iter([tokens]))], 201)
    assert shown.stretches.first.tolist() == [0, 105]  # the worst of the long ones, then the beginning


def test_one_stretch_is_always_shown():
    assert len(shown_text([("a", lambda: iter([record()]))], 3).tokens[0]) > 0


def test_no_token_no_text():
    assert shown_text([("a", lambda: iter(()))], 100) is None
    assert shown_text([], 100) is None


def test_models_that_scored_the_same_tokens_are_shown_together():
    base, other = record(seed=0), record(seed=0)
    other.nll[:] += 1
    shifted = record(seed=1)
    fewer = record(seed=0, skip=(2,))
    named = {"base": base, "other": other, "shifted": shifted, "fewer": fewer}
    readers = [(name, lambda tokens=tokens: iter(parts(tokens, 999))) for name, tokens in named.items()]
    shown = shown_text(readers, 10**6)
    assert shown.names == ("base", "other")
    assert shown.missing == ("shifted", "fewer")
    np.testing.assert_array_equal(shown.tokens[1].nll, base.nll + 1)


def test_data_of_the_page_is_the_record(tmp_path):
    words = [f"word{n}" for n in range(50)]
    (tmp_path / "words.txt").write_text("\n".join(words), encoding="utf-8")
    tokens = record(skip=(3,))
    tokens.nll[:3] = np.nan, np.inf, 0.123456789
    shown = shown_text([("a", lambda: iter([tokens]))], 10**6)
    data = json.loads(
        json.dumps(text_data(shown, open_vocabulary(tmp_path / "words.txt"), document_name), allow_nan=False)
    )
    assert [data["strings"][i] for i in data["text"]] == [words[label] for label in tokens.label]
    assert len(set(data["strings"])) == len(data["strings"]) <= 50
    assert data["nll"][0][:3] == ["NaN", "Infinity", 0.1235]
    np.testing.assert_allclose(data["nll"][0][3:], tokens.nll[3:], rtol=5e-4)
    np.testing.assert_allclose(data["p_max"][0], tokens.p_max, rtol=5e-4)
    assert data["rank"][0] == tokens.rank.tolist()
    assert data["row"] == tokens.row.tolist()
    assert [stretch["to"] for stretch in data["stretches"]] == np.cumsum(
        [29, 2000, 500, 1, 700, 2000, 2000, 1]
    ).tolist()
    assert data["stretches"][1]["name"] == "document 1, rows 30 to 2,029"


def test_stretches_bear_the_names_of_their_documents():
    shown = shown_text([("a", lambda: iter([record((3, 4))]))], 100)
    names = [
        stretch["name"] for stretch in text_data(shown, Numbers(), partial(document_name, names=["alpha"]))["stretches"]
    ]
    assert names == ["alpha, rows 0 to 2", "document 1, rows 3 to 6"]
    shown = shown_text([("a", lambda: iter([record((3, 4), documents=False)]))], 100)
    assert text_data(shown, Numbers(), document_name)["stretches"][1]["name"] == "rows 3 to 6"


# ---- vocabularies ----


def test_without_a_vocabulary_tokens_are_numbers():
    assert open_vocabulary(None).texts(np.array([3, 0])) == ["3", "0"]


def test_words_are_the_lines_of_a_file_and_nothing_else_ends_a_line(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes("<unk>\r\na\u2028b\n\nlast\x0b".encode())
    vocabulary = open_vocabulary(path)
    assert vocabulary.texts(np.arange(4)) == ["<unk>", "a\u2028b", "", "last\x0b"]
    with pytest.raises(
        ValueError, match=r"words\.txt has 4 tokens, but a label is 4: it is another model's vocabulary"
    ):
        vocabulary.texts(np.array([1, 4]))


def byte_level_tokenizer(path):
    from tokenizers import AddedToken, Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "Ġb": 1, "Ã": 2, "©": 3}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.save(str(path))


def test_a_tokenizer_gives_the_text_itself_and_a_split_character_to_its_last_token(tmp_path):
    byte_level_tokenizer(tmp_path / "tokenizer.json")
    vocabulary = open_vocabulary(tmp_path / "tokenizer.json")
    assert vocabulary.separator == ""
    assert vocabulary.texts(np.array([0, 1, 2, 3, 4, 0])) == ["a", " b", "", "é", "<|end|>", "a"]
    with pytest.raises(ValueError, match="has 5 tokens, but a label is 5"):
        vocabulary.texts(np.array([5]))


def test_a_file_that_is_no_vocabulary_says_so(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json must be a tokenizer\.json of Hugging Face's tokenizers"):
        open_vocabulary(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError):
        open_vocabulary(tmp_path / "none.json")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"latin\.txt must be UTF-8 text"):
        open_vocabulary(tmp_path / "latin.txt")


def test_the_limit_of_a_stretch_is_what_the_tests_assume():
    assert module.STRETCH == 2000
