"""The text of tokens: from a model's tokenizer, a list of words, or, without either, their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Vocabulary(Protocol):
    """What tokens look like, those after one another in a text."""

    separator: str  # stands between two tokens

    def texts(self, tokens: np.ndarray) -> list[str]: ...


class Numbers:
    """Tokens of which only the number is known."""

    separator = " "

    def texts(self, tokens: np.ndarray) -> list[str]:
        return list(map(str, tokens.tolist()))


class Words:
    """Token n is the n-th of these; the words of a text stand apart."""

    separator = " "

    def __init__(self, name: str, words: Sequence[str]) -> None:
        self._name, self._words = name, words

    def texts(self, tokens: np.ndarray) -> list[str]:
        check_known(self._name, tokens, len(self._words))
        return [self._words[token] for token in tokens]


class Pieces:
    """Tokens of a Hugging Face tokenizer, spaces and all. Where a character is made of several, the last one has it."""

    separator = ""

    def __init__(self, name: str, tokenizer: Any) -> None:
        self._name, self._tokenizer = name, tokenizer

    def texts(self, tokens: np.ndarray) -> list[str]:
        from tokenizers.decoders import DecodeStream

        known = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        check_known(self._name, tokens, known)
        stream = DecodeStream(skip_special_tokens=False)
        return [stream.step(self._tokenizer, token) or "" for token in tokens.tolist()]


def check_known(name: str, tokens: np.ndarray, known: int) -> None:
    """ValueError: a token that the vocabulary lacks."""
    if tokens.size and tokens.max() >= known:
        raise ValueError(
            f"{name} has {known:,} tokens, but a label is {tokens.max():,}: it is another model's vocabulary"
        )


def open_vocabulary(path: Path | None) -> Vocabulary:
    """Of a Hugging Face tokenizer.json, or a text file (UTF-8) with a word per line, the first being token 0.

    Raises: ValueError: a file of another kind; OSError; ImportError: tokenizers is needed and missing.
    """
    if path is None:
        return Numbers()
    if path.suffix == ".json":
        return Pieces(str(path), _tokenizer(path))
    return Words(str(path), read_lines(path))


def _tokenizer(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(f"{path} needs tokenizers: pip install tokenizers") from error
    path.open("rb").close()  # a missing file says so itself
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} must be a tokenizer.json of Hugging Face's tokenizers: {error}") from error


def read_lines(path: Path) -> list[str]:
    """Of a text file, whose lines may hold any character but those that end a line."""
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            return [line.removesuffix("\n").removesuffix("\r") for line in file]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text, a line each: {error}") from None
