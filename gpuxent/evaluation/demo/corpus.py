"""The demonstration's text: tokens, vocabulary, and which tokens are held out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TOKEN = re.compile(r"\w+(?:['\u2019]\w+)*|([^\w\s])\1*")  # a word, or a run of one punctuation mark: >>> == **
UNKNOWN = "<unk>"
HELD_OUT = 0.1  # share of every document, its end
MIN_TOKENS = 1000  # in all: with less there is nothing to learn from and nothing to score
MIN_COUNT = 2  # a word seen once in training becomes <unk>, so that <unk> is trained too
DOCUMENT_TOKENS = 200  # at least, in a document gathered from paragraphs

# Bounds on the work, whatever the text: its time, and the size of the stored logits (held-out tokens x vocabulary).
MAX_TOKENS = 150_000
MAX_CHARACTERS = 12 * MAX_TOKENS


@dataclass(frozen=True)
class Corpus:
    """Documents one after another: of every token its text, its class, its document, and whether it is held out."""

    title: str
    names: list[str]  # of the documents
    vocab: list[str]  # the classes; <unk> is class 0
    words: list[str]
    tokens: np.ndarray
    document: np.ndarray
    held_out: np.ndarray
    cut: bool = False  # there was more text than MAX_TOKENS

    @property
    def padding(self) -> int:
        """What stands before a document's first token in a context. Never predicted, so no class: one past the last."""
        return len(self.vocab)

    def contexts(self, places: np.ndarray, width: int) -> np.ndarray:
        """(len(places), width): the tokens before each place, the nearest first, none from another document.

        The context of a held-out token reaches back into held-out and training tokens: when a word is predicted, all
        that was written before it is known.
        """
        starts = np.searchsorted(self.document, self.document[places])
        before = places[:, None] - np.arange(1, width + 1)
        return np.where(before >= starts[:, None], self.tokens[np.maximum(before, 0)], self.padding)


def tokenize(text: str) -> list[str]:
    return [match.group() for match in TOKEN.finditer(text.lower())]


def build_corpus(title: str, documents: Iterable[tuple[str, str]]) -> Corpus:
    """The corpus of (name, text) pairs, cut at MAX_TOKENS; the vocabulary is that of the training part.

    ValueError if there are fewer than MIN_TOKENS tokens, or if no word occurs twice.
    """
    names: list[str] = []
    words: list[str] = []
    document: list[int] = []
    held_out: list[bool] = []
    cut = False
    for name, text in documents:
        found = tokenize(text)
        cut = len(words) + len(found) > MAX_TOKENS
        found = found[: MAX_TOKENS - len(words)]
        if len(found) >= 2:  # one to train on, one to hold out
            held = max(1, round(HELD_OUT * len(found)))
            words += found
            document += [len(names)] * len(found)
            held_out += [False] * (len(found) - held) + [True] * held
            names.append(name)
        if cut:
            break
    if len(words) < MIN_TOKENS:
        raise ValueError(f"{title} has {len(words):,} words and punctuation marks; at least {MIN_TOKENS:,} are needed")
    vocab = build_vocab(word for word, held in zip(words, held_out, strict=True) if not held)
    if len(vocab) < 2:
        raise ValueError(f"{title} has no word that occurs {MIN_COUNT} times, so there is nothing to learn")
    classes = {word: i for i, word in enumerate(vocab)}
    tokens = np.array([classes.get(word, 0) for word in words], np.int32)
    return Corpus(title, names, vocab, words, tokens, np.array(document, np.int32), np.array(held_out), cut)


def build_vocab(words: Iterable[str]) -> list[str]:
    """<unk>, then the words seen at least MIN_COUNT times: the most frequent first, equals by alphabet."""
    counts = Counter(words)
    return [UNKNOWN, *sorted((w for w, n in counts.items() if n >= MIN_COUNT), key=lambda w: (-counts[w], w))]


def reference_corpus() -> Corpus:
    """Python's language reference, which every Python brings along: a document per topic of `help()`."""
    from pydoc_data.topics import topics

    return build_corpus("Python's language reference", without_repeats(topics).items())


def without_repeats(documents: dict[str, str]) -> dict[str, str]:
    """Each paragraph only in the shortest document that has it.

    A fifth of the reference stands in two topics: "for" and "compound". Held out in one and learned in the other, it
    would flatter the model.
    """
    seen: set[str] = set()
    kept = {}
    for name in sorted(documents, key=lambda name: len(documents[name])):
        found = paragraphs(documents[name])
        kept[name] = "\n\n".join(p for p in found if p.strip() not in seen)
        seen.update(p.strip() for p in found)
    return {name: kept[name] for name in documents}


def paragraphs(text: str) -> list[str]:
    return re.split(r"\n(?:[^\S\n]*\n)+", text)


def text_corpus(path: Path) -> Corpus:
    """A UTF-8 text file; ValueError, naming the file, if it is no text or too small, OSError if it cannot be read."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MAX_CHARACTERS)
            more = bool(file.read(1))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start:,}") from error
    title = f"the first {MAX_CHARACTERS:,} characters of {path}" if more else str(path)
    return build_corpus(title, gather_paragraphs(text))


def gather_paragraphs(text: str) -> Iterator[tuple[str, str]]:
    """(name, text) of documents of at least DOCUMENT_TOKENS tokens: consecutive paragraphs, which blank lines part.

    What is left at the end belongs to the last document. A name is the document's number and its first words.
    """
    gathered: list[list[str]] = [[]]
    size = 0
    for paragraph in paragraphs(text):
        if size >= DOCUMENT_TOKENS:
            gathered.append([])
            size = 0
        gathered[-1].append(paragraph)
        size += len(tokenize(paragraph))
    if size < DOCUMENT_TOKENS and len(gathered) > 1:
        rest = gathered.pop()
        gathered[-1] += rest
    for number, group in enumerate(gathered):
        text = "\n\n".join(group)
        yield f"{number}: {' '.join(text.split()[:5])[:40]}", text
