"""What a comparison of two models on the same tokens has found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from gpuxent.evaluation.statistics.result import finite


@dataclass(frozen=True)
class Estimate:
    """A number with its standard errors: of documents drawn independently, where there are ids, and of tokens."""

    value: float
    stderr_cluster: float | None
    stderr_iid: float

    def scaled(self, factor: float, value: float) -> Estimate:
        """Another value, whose errors are these times the factor (the delta method)."""
        cluster = None if self.stderr_cluster is None else factor * self.stderr_cluster
        return Estimate(value, cluster, factor * self.stderr_iid)


@dataclass(frozen=True)
class ChangedDocument:
    """A document's scored tokens, and its mean losses in nats per token."""

    document: int
    scored: int
    base: float
    other: float


@dataclass(frozen=True)
class ChangedToken:
    """A token's row, label and document, and its losses in nats."""

    row: int
    label: int
    document: int | None
    base: float
    other: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns. Differences are other - base: a positive one is a worse model `other`.

    base and other are cross-entropies in nats per token, base_perplexity and other_perplexity their exponentials.
    log_ratio is the mean difference of the losses, ln(PPL(other) / PPL(base)), ratio its exponential and difference
    that of the perplexities; their errors are those of pairs. correlation is that of the tokens' losses. delta_p is the
    change of the label's probability, with its root mean square and quantiles. Of the rows where the top class is
    the label, both_right, only_base_right and only_other_right say in which model.

    Where both models' logits were read: kl is the mean of KL(base || other) in nats, with its quantiles, reverse_kl
    that of KL(other || base), js that of the Jensen-Shannon divergence, tv that of the total variation (0 to 1, the
    probability that would have to move), and same_top the share of rows whose most probable class is the same.
    Quantiles are right within the relative `quantile_error`; 0: exact.

    Tokens with a NaN or infinite loss in either model are among the scored ones, and counted as `bad`. rows are those
    of the data set, and `share` of them is in these numbers: less than 1 of an interrupted run. mixed names the
    backends and CPU types if there were several.
    """

    scored: int
    bad: int
    first_bad_row: int | None
    documents: int | None
    base: Estimate
    other: Estimate
    base_perplexity: Estimate
    other_perplexity: Estimate
    log_ratio: Estimate
    ratio: Estimate
    difference: Estimate
    correlation: float
    delta_p: Estimate
    delta_p_rms: Estimate
    delta_p_quantiles: dict[float, float]
    quantile_error: float
    both_right: int
    only_base_right: int
    only_other_right: int
    neither_right: int
    base_entropy: float
    other_entropy: float
    kl: Estimate | None = None
    kl_quantiles: dict[float, float] | None = None
    reverse_kl: Estimate | None = None
    js: Estimate | None = None
    tv: Estimate | None = None
    same_top: Estimate | None = None
    worse_documents: tuple[ChangedDocument, ...] = field(default=(), repr=False)
    better_documents: tuple[ChangedDocument, ...] = field(default=(), repr=False)
    worse_tokens: tuple[ChangedToken, ...] = field(default=(), repr=False)
    better_tokens: tuple[ChangedToken, ...] = field(default=(), repr=False)
    rows: int = 0
    share: float = 1.0
    mixed: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON: None for what is not finite."""
        data = asdict(self)
        for name in ("delta_p_quantiles", "kl_quantiles"):
            if data[name] is not None:
                data[name] = {str(q): value for q, value in data[name].items()}
        return finite({name: list(value) if isinstance(value, tuple) else value for name, value in data.items()})
