"""Rows that have passed the door, and the steps from there to a loss and its gradient, the same on every backend."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

from gpuxent import _arguments as arguments
from gpuxent import _row_loss
from gpuxent._records import IGNORED, Array, GradWeights, LinearGrad, RowStats, Spread
from gpuxent._row_loss import LossOptions, RowSummary
from gpuxent.backends import backend_of


@dataclass(frozen=True)
class Rows:
    """Logits and labels that have passed the door, and the steps from there to a loss, the same on every backend."""

    backend: Any
    logits: Array
    labels: Array  # (...) int64: a class, IGNORED or NO_LABEL
    label_weight: Array | float | None  # (...), or 1; None for soft labels
    spread: Spread | None
    options: LossOptions

    @classmethod
    def open(
        cls,
        logits: Any,
        labels: Any,
        *,
        class_weight: Any = None,
        ignore_index: Any = arguments.DEFAULT_IGNORE_INDEX,
        label_smoothing: Any = 0.0,
        z_loss: Any = 0.0,
        softcap: Any = None,
        temperature: Any = 1.0,
        reduction: Any = "mean",
        check_labels: bool = True,
        backend: str | None = None,
    ) -> Rows:
        """Check everything."""
        logits = arguments.rows(logits, "logits")
        vocab = logits.shape[-1]
        weight = arguments.class_weight(class_weight, logits, check_labels)
        scalars = (ignore_index, label_smoothing, z_loss, softcap, temperature, reduction)
        try:
            options = _options_seen(*scalars)
        except TypeError:
            options = None
        if options is None:  # one cannot be hashed, or is wrong: this says which
            options = _options(*scalars)
        if weight is not None:
            options = replace(options, class_weight=weight)
        labels, soft = arguments.labels(labels, logits)
        owner = backend_of(logits, backend)
        labels = owner.laid_out_as(logits, labels)
        if soft:
            if options.ignore_index != arguments.DEFAULT_IGNORE_INDEX:
                raise ValueError(f"ignore_index must be left at its default with soft labels, got {ignore_index!r}")
            row_labels = (
                arguments.check_distributions(owner, labels, "labels") if check_labels else owner.unlabelled(labels)
            )
            return cls(owner, logits, row_labels, None, options.spread(labels, vocab), options)
        check = partial(
            arguments.class_labels,
            vocab=vocab,
            ignore=options.ignore_index,
            check=check_labels,
        )
        labels = owner.map_rows(check, labels, dtype=np.int64, at=True)
        label_weight: Array | float = 1.0
        if options.class_weight is not None:
            label_weight = owner.map_rows(partial(_row_loss.take_class_weight, options.class_weight), labels)
        return cls(owner, logits, labels, label_weight, options.spread(None, vocab), options)

    def stats(self, also: tuple[str, ...] = ()) -> RowStats:
        return self.backend.row_stats(
            self.logits, self.labels, spread=self.spread, transform=self.options.transform, also=also
        )

    def losses(self, stats: RowStats) -> tuple[Array, Array]:
        """(cross-entropy, z-loss term) of each row, float64."""
        options = self.options
        rule = partial(
            _row_loss.row_losses,
            smoothing=options.label_smoothing,
            z_loss=options.z_loss,
            has_spread=self.spread is not None,
        )
        return self.backend.map_rows(rule, stats, self.labels, self.label_weight, outputs=2)

    def denominators(self, given: Any) -> tuple[Any, Any]:
        """What the mean divides the cross-entropy and the z-loss by; 1 for the other reductions."""
        if self.options.reduction != "mean":
            return 1.0, 1.0
        if given is not None:
            return given, given
        counted = self.backend.total(self.labels != IGNORED)
        weighted = self.label_weight is not None and self.options.class_weight is not None
        return (self.backend.total(self.label_weight) if weighted else counted), counted

    def reduced(self, losses: Array, z: Array, denominator: Any, z_denominator: Any) -> Any:
        """Each term over its own denominator; NaN over 0, whatever smoothing adds to the sum, as in PyTorch."""
        if self.options.reduction == "none":
            return arguments.as_row_dtype(self.backend, losses + z, arguments.row_dtype(self.logits))
        loss = self.backend.total(losses, denominator)
        return loss + self.backend.total(z, z_denominator) if self.options.z_loss else loss

    def stats_and_gradient(
        self,
        grad_output: Any,
        denominator: Any,
        z_denominator: Any,
        also: tuple[str, ...] = (),
        out: Array | None = None,
    ) -> tuple[RowStats, Array]:
        weights = self.weights(grad_output, denominator, z_denominator)
        how = {"spread": self.spread, "transform": self.options.transform, "also": also}
        return self.backend.row_stats_and_grad(self.logits, self.labels, weights, out=out, **how)

    def stats_and_parameter_grad(
        self, grad_output: Any, denominator: Any, z_denominator: Any, *, also: tuple[str, ...], **which: Any
    ) -> tuple[RowStats, LinearGrad]:
        """Of logits that are products; `which` gradients, as the backend takes it."""
        weights = self.weights(grad_output, denominator, z_denominator)
        how = {"spread": self.spread, "transform": self.options.transform, "also": also}
        return self.backend.row_stats_and_parameter_grad(self.logits, self.labels, weights, **which, **how)

    def weights(self, grad_output: Any, denominator: Any, z_denominator: Any) -> GradWeights:
        rule = partial(_row_loss.grad_weights, smoothing=self.options.label_smoothing, z_loss=self.options.z_loss)
        vectors = (self.labels, self.label_weight, grad_output, denominator, z_denominator)
        return GradWeights(*self.backend.map_rows(rule, *vectors, outputs=3))

    def summary(self, stats: RowStats) -> RowSummary:
        lse, argmax, p_max = self.backend.map_rows(_row_loss.summary, stats, outputs=3)
        return RowSummary(lse, argmax.astype(np.int64), p_max)


def _options(
    ignore_index: Any, label_smoothing: Any, z_loss: Any, softcap: Any, temperature: Any, reduction: Any
) -> LossOptions:
    return LossOptions(
        None,
        arguments.ignore_index(ignore_index),
        arguments.number(label_smoothing, "label_smoothing", 0, 1),
        arguments.number(z_loss, "z_loss", 0),
        arguments.transform(softcap, temperature),
        arguments.one_of(reduction, "reduction", arguments.REDUCTIONS),
    )


# Most calls have options that another had: of a call on one row, these checks are a tenth.
_options_seen = lru_cache(maxsize=64, typed=True)(_options)


def reduced(owner: Any, losses: Array, counted: Array | None, reduction: str, dtype: type) -> Any:
    """The losses reduced; the mean divides by the sum of `counted`, or by the number of rows."""
    if reduction == "none":
        return arguments.as_row_dtype(owner, losses, dtype)
    if reduction == "sum":
        return owner.total(losses, 1.0)
    return owner.total(losses, float(losses.size) if counted is None else owner.total(counted))


@dataclass(frozen=True)
class BinaryRows:
    """Scores and targets of independent sigmoids that have passed the door; one axis (N,) is N rows of one column."""

    backend: Any
    scores: Array
    targets: Array
    settings: dict[str, Any]
    from_probs: bool
    reduction: str
    single: bool

    @classmethod
    def open(
        cls,
        scores: Any,
        targets: Any,
        name: str,
        *,
        pos_weight: Any,
        class_weight: Any,
        ignore_index: Any,
        reduction: Any,
        backend: str | None = None,
        check: bool = True,
    ) -> BinaryRows:
        """Check everything; without `check`, all but the values of scores and targets."""
        scores = arguments.float_array(scores, name)
        if scores.ndim != 1:
            scores = arguments.rows(scores, name)
        targets = arguments.binary_targets(targets, scores, name)
        settings: dict[str, Any] = {
            "pos_weight": arguments.binary_weight(pos_weight, "pos_weight", scores),
            "class_weight": arguments.binary_weight(class_weight, "class_weight", scores),
            "ignore_index": arguments.binary_ignore_index(ignore_index, targets.dtype),
        }
        reduction = arguments.one_of(reduction, "reduction", arguments.REDUCTIONS)
        owner = backend_of(scores, backend)
        single = scores.ndim == 1
        if single:
            scores, targets = scores[:, None], targets[:, None]
        targets = owner.laid_out_as(scores, targets)

        def checked(values: Array, name: str, ignore: float | None) -> Array:
            check = partial(arguments.unit_interval, name=name, ignore=ignore, single=single)
            outside, _ = owner.row_sums(values, high=1.0, ignore=ignore)
            return owner.after(owner.map_rows(check, outside, dtype=np.int64, at=True), values)

        if check:
            targets = checked(targets, "targets", settings["ignore_index"])
        if check and name == "probs":
            scores = checked(scores, name, None)
        return cls(owner, scores, targets, settings, name == "probs", reduction, single)

    def loss(self, denominator: Any = None) -> tuple[Any, Any]:
        """(reduced loss, what the mean divides by)."""
        if self.reduction == "none":
            losses = self.backend.binary_losses(self.scores, self.targets, from_probs=self.from_probs, **self.settings)
            return self._as_given(losses), 1.0
        sums, counts = self.backend.binary_sums(self.scores, self.targets, from_probs=self.from_probs, **self.settings)
        if self.reduction == "sum":
            denominator = 1.0
        elif denominator is None:
            denominator = self.backend.total(counts)
        return self.backend.total(sums, denominator), denominator

    def gradient(self, upstream: Any, denominator: Any, out: Array | None) -> Array:
        scale = self.backend.map_rows(_row_loss.over, upstream, denominator)
        if scale.ndim:
            scale = self.backend.laid_out_as(self.scores, scale[:, None] if self.single else scale)
        out = out[:, None] if self.single and out is not None else out
        grad = self.backend.binary_grad(self.scores, self.targets, scale, out=out, **self.settings)
        return self._as_given(grad)

    def _as_given(self, values: Array) -> Array:
        return values[:, 0] if self.single else values
