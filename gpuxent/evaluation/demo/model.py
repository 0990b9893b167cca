"""A log-bilinear language model in NumPy, trained through `gpuxent.linear_cross_entropy_and_grad`.

Mnih & Hinton, "Three new graphical models for statistical language modelling", ICML 2007.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gpuxent._optimizers import Adam
from gpuxent.linear import linear_cross_entropy_and_grad

Gradients = dict[str, np.ndarray]


@dataclass(frozen=True)
class Settings:
    """Chosen on the last tenth of each document's training tokens, not on the held-out ones."""

    dimension: int = 128
    context: int = 5
    epochs: int = 8
    batch: int = 256
    rate: float = 8e-3  # of Adam: reached after `warmup` steps, then falling in a line to 0
    warmup: int = 100
    dropout: float = 0.5  # of the entries of the context's embeddings
    decay: float = 0.2  # of the weights but the bias: the share of itself that a weight loses per step, over the rate
    max_logits: int = 2_500_000_000  # computed in training: what bounds the time for a large text
    max_seconds: float = 45.0  # then training ends early: NumPy's matrix products are slow where cores are shared
    seed: int = 0

    def steps(self, tokens: int, vocab: int) -> int:
        """How many minibatches: those of the epochs, or fewer if that is more than `max_logits`."""
        wanted = self.epochs * max(tokens // self.batch, 1)
        return max(min(wanted, self.max_logits // (self.batch * vocab)), 1)


@dataclass
class LogBilinear:
    """hidden = sum over k of embedding[context[k]] @ position_weight[k]; logits = hidden @ classifier.T + bias.

    The classifier is the embedding: half the parameters, and less overfitting (Press & Wolf, arXiv 1608.05859).
    """

    embedding: np.ndarray  # (vocab + 1, dimension); the last one is the padding before a document
    position_weight: np.ndarray  # (context * dimension, dimension): a matrix per position, the nearest word's first
    bias: np.ndarray  # (vocab,)

    @classmethod
    def create(cls, bias: np.ndarray, settings: Settings, rng: np.random.Generator) -> LogBilinear:
        """Starts as almost the unigram: the bias is its log-probabilities, and the embeddings are small."""
        dtype, vocab, dimension, context = bias.dtype, bias.size, settings.dimension, settings.context
        return cls(
            rng.normal(0, 0.1, (vocab + 1, dimension)).astype(dtype),
            np.tile(np.eye(dimension, dtype=dtype) / context, (context, 1)),
            bias.copy(),
        )

    @property
    def classifier(self) -> np.ndarray:
        """(vocab, dimension)"""
        return self.embedding[:-1]

    def features(self, contexts: np.ndarray) -> np.ndarray:
        """(rows, context * dimension): the embeddings of each context side by side."""
        return self.embedding[contexts].reshape(len(contexts), -1)

    def hidden(self, contexts: np.ndarray) -> np.ndarray:
        """(rows, dimension)"""
        return self.features(contexts) @ self.position_weight

    def logits(self, contexts: np.ndarray) -> np.ndarray:
        logits = self.hidden(contexts) @ self.classifier.T
        logits += self.bias
        return logits

    def rounded(self, bits: int) -> LogBilinear:
        """A copy whose weights, but the bias, are multiples of one number per row that fit into so many bits."""
        return LogBilinear(_rounded(self.embedding, bits), _rounded(self.position_weight, bits), self.bias)

    def loss_and_grad(
        self, contexts: np.ndarray, labels: np.ndarray, mask: np.ndarray | float = 1.0
    ) -> tuple[float, Gradients]:
        """Mean cross-entropy in nats and its gradient by each parameter; `mask` multiplies the features (dropout)."""
        features = self.features(contexts) * mask
        hidden = features @ self.position_weight
        loss, grad = linear_cross_entropy_and_grad(hidden, self.classifier, labels, bias=self.bias)
        dfeatures = (grad.hidden @ self.position_weight.T) * mask
        dembedding = sum_by_row(dfeatures.reshape(contexts.size, -1), contexts.ravel(), len(self.embedding))
        dembedding[:-1] += grad.classifier
        return float(loss), {
            "embedding": dembedding,
            "position_weight": features.T @ grad.hidden,
            "bias": grad.bias,
        }


def _rounded(rows: np.ndarray, bits: int) -> np.ndarray:
    step = np.abs(rows).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
    return np.where(step > 0, np.round(rows / np.where(step > 0, step, 1)) * step, 0).astype(rows.dtype)


def sum_by_row(values: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """(count, dimension): the sum of the values that belong to each row. Sorting beats `np.add.at` several times."""
    order = np.argsort(rows, kind="stable")
    present, starts = np.unique(rows[order], return_index=True)
    sums = np.zeros((count, values.shape[1]), values.dtype)
    sums[present] = np.add.reduceat(values[order], starts)
    return sums


@dataclass(frozen=True)
class Trained:
    """A model, of how many planned steps it took how many, and the time. With all of them it is the same every time."""

    model: LogBilinear
    steps: int
    planned: int
    seconds: float


def train(
    contexts: np.ndarray,
    labels: np.ndarray,
    vocab: int,
    settings: Settings,
    on_step: Callable[[int, float], None] = lambda epoch, loss: None,
) -> Trained:
    """A model of labels given contexts; `on_step` is told the epoch, counted from 1, and the minibatch's loss."""
    started = time.monotonic()
    rng = np.random.default_rng(settings.seed)
    model = LogBilinear.create(log_unigram(labels, vocab).astype(np.float32), settings, rng)
    adam = Adam(settings.decay, undecayed=("bias",))  # it decays to the uniform, not to the unigram it starts from
    batch = min(settings.batch, len(labels))
    per_epoch = len(labels) // batch
    steps = settings.steps(len(labels), vocab)
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = rng.permutation(len(labels))
        rows = order[place * batch : (place + 1) * batch]
        kept = rng.random((batch, settings.context * settings.dimension), dtype=np.float32) >= settings.dropout
        mask = kept * np.float32(1 / (1 - settings.dropout))
        loss, gradients = model.loss_and_grad(contexts[rows], labels[rows], mask)
        adam.step(vars(model), gradients, settings.rate * min(1, (step + 1) / settings.warmup) * (1 - step / steps))
        on_step(epoch + 1, loss)
        if time.monotonic() - started > settings.max_seconds:
            break
    return Trained(model, step + 1, steps, time.monotonic() - started)


def log_unigram(labels: np.ndarray, vocab: int) -> np.ndarray:
    """Log-probability of each class by its frequency, one added to each count (Laplace), so that none is 0. Float64."""
    counts = np.bincount(labels, minlength=vocab)
    return np.log((counts + 1) / (labels.size + vocab))
