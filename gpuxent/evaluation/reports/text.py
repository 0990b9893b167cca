"""The text of a run, token by token: which stretches of it a report shows, and what is said of each token.

A stretch is of adjacent tokens of one document and sequence, at most STRETCH rows long. What is chosen are whole
stretches, so that millions of tokens need no more memory than their stretches and the tokens shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from gpuxent.evaluation.reports.vocabulary import Vocabulary
from gpuxent.evaluation.statistics.tokens import Tokens

STRETCH = 2000  # rows
FEW = 20  # tokens: the mean loss of a stretch with fewer says little
Reader = Callable[[], Iterator[Tokens]]


@dataclass(frozen=True)
class Stretches:
    """Stretches in the order of the text, as arrays of one length."""

    first: np.ndarray  # the row of the first token
    last: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray  # the sum, nats

    def take(self, places: np.ndarray) -> Stretches:
        return Stretches(*(column[places] for column in vars(self).values()))

    def holding(self, rows: np.ndarray) -> np.ndarray:
        """Of each row the stretch it is in, or -1."""
        if not self.first.size:
            return np.full(rows.size, -1)
        places = np.searchsorted(self.first, rows, side="right") - 1
        return np.where((places >= 0) & (rows <= self.last[places]), places, -1)


@dataclass(frozen=True)
class Text:
    """The shown tokens of one or more models, which scored the same ones."""

    names: tuple[str, ...]  # of the models
    tokens: tuple[Tokens, ...]  # of each
    stretches: Stretches
    scored: int  # tokens in all
    missing: tuple[str, ...] = ()  # models that scored other tokens


def shown_text(models: Sequence[tuple[str, Reader]], limit: int) -> Text | None:
    """About `limit` tokens in whole stretches: for half of them the stretches with the largest mean loss of the first
    model, for the others those at the beginning. None if there is no token."""
    if not models:
        return None
    (name, read), *others = models
    every = stretches_of(read())
    if not every.first.size:
        return None
    chosen = every.take(choose(every, limit))
    tokens = tokens_in(chosen, read())
    assert tokens is not None
    names, columns, missing = [name], [tokens], []
    for other, read_other in others:
        found = tokens_in(chosen, read_other())
        if found is not None and np.array_equal(found.row, tokens.row) and np.array_equal(found.label, tokens.label):
            names.append(other)
            columns.append(found)
        else:
            missing.append(other)
    return Text(tuple(names), tuple(columns), chosen, int(every.tokens.sum()), tuple(missing))


def stretches_of(parts: Iterable[Tokens]) -> Stretches:
    """Of all tokens, which are in the order of their rows."""
    found = [_joined(*_single(part)) for part in parts if len(part)]
    if not found:
        none = np.zeros(0, np.int64)
        return Stretches(none, none, none, np.zeros(0))
    keys, stretches = zip(*found, strict=True)
    columns = (np.concatenate([getattr(some, name) for some in stretches]) for name in vars(stretches[0]))
    return _joined(np.concatenate(keys, axis=1), Stretches(*columns))[1]


def _single(part: Tokens) -> tuple[np.ndarray, Stretches]:
    """Every token as a stretch, and what is the same for tokens of one: where the sequence begins, and which piece."""
    key = np.stack([part.row - part.position, part.position // STRETCH])
    return key, Stretches(part.row, part.row, np.ones(len(part), np.int64), part.nll)


def _joined(key: np.ndarray, stretches: Stretches) -> tuple[np.ndarray, Stretches]:
    """Neighbours of the same key as one."""
    starts = np.concatenate([[0], np.flatnonzero((key[:, 1:] != key[:, :-1]).any(axis=0)) + 1])
    stops = np.append(starts[1:], key.shape[1])
    tokens, loss = (np.add.reduceat(column, starts) for column in (stretches.tokens, stretches.loss))
    return key[:, starts], Stretches(stretches.first[starts], stretches.last[stops - 1], tokens, loss)


def choose(stretches: Stretches, limit: int) -> np.ndarray:
    """Places of the stretches that are shown, in order; at least one."""
    with np.errstate(invalid="ignore"):
        mean = stretches.loss / np.maximum(stretches.tokens, 1)
    mean = np.where(np.isnan(mean), math.inf, mean)
    worst = np.lexsort((-mean, stretches.tokens < FEW))
    half = _fitting(stretches.tokens, worst, limit // 2)
    left = np.setdiff1d(np.arange(mean.size), half)
    rest = _fitting(stretches.tokens, left, limit - int(stretches.tokens[half].sum()))
    chosen = np.union1d(half, rest)
    return chosen if chosen.size else worst[:1]


def _fitting(tokens: np.ndarray, order: np.ndarray, limit: int) -> np.ndarray:
    """The first of them that have no more tokens than that together."""
    return order[: int(np.searchsorted(np.cumsum(tokens[order]), limit, side="right"))]


def tokens_in(stretches: Stretches, parts: Iterable[Tokens]) -> Tokens | None:
    found = [part.take(np.flatnonzero(stretches.holding(part.row) >= 0)) for part in parts]
    return Tokens.concatenated(found) if found else None


def text_data(text: Text, vocabulary: Vocabulary, called: Callable[[int], str]) -> dict[str, Any]:
    """What the page is given, for JSON: every string once, and numbers in as many digits as are read. `called` names a
    document by its id."""
    tokens = text.tokens[0]
    place = text.stretches.holding(tokens.row)
    bounds = np.searchsorted(place, np.arange(text.stretches.first.size + 1)).tolist()
    strings: dict[str, int] = {}
    words: list[int] = []
    stretches = []
    for start, stop in pairwise(bounds):
        shown = vocabulary.texts(tokens.label[start:stop])
        words += [strings.setdefault(string, len(strings)) for string in shown]
        stretches.append({"name": _name(tokens, start, stop, called), "from": start, "to": stop})
    return {
        "models": list(text.names),
        "separator": vocabulary.separator,
        "strings": list(strings),
        "stretches": stretches,
        "text": words,
        "label": tokens.label.tolist(),
        "row": tokens.row.tolist(),
        "position": tokens.position.tolist(),
        "nll": [_short(found.nll) for found in text.tokens],
        "rank": [found.rank.tolist() for found in text.tokens],
        "p_max": [_short(found.p_max) for found in text.tokens],
    }


def _name(tokens: Tokens, start: int, stop: int, called: Callable[[int], str]) -> str:
    rows = f"rows {tokens.row[start]:,} to {tokens.row[stop - 1]:,}"
    if tokens.document is None:
        return rows
    return f"{called(int(tokens.document[start]))}, {rows}"


def document_name(document: int, names: Sequence[str] | None = None) -> str:
    return names[document] if names and 0 <= document < len(names) else f"document {document}"


def _short(values: np.ndarray) -> list[float | str]:
    """Four digits; what JSON has no number for as text that JavaScript's Number() reads."""
    special = {math.inf: "Infinity", -math.inf: "-Infinity"}
    return [float(f"{v:.4g}") if math.isfinite(v) else special.get(v, "NaN") for v in values.tolist()]
