"""What is measured on a CPU, and how good it has to be (section 6 of the design)."""

from __future__ import annotations

from bench.cases import OURS_NUMPY, Case, Target, share


def against_torch(at_least: float, *more: Target) -> tuple[Target, ...]:
    return (Target("torch", at_least), *more)


CASES = (
    # The headline: a vocabulary of 128k.
    Case("loss", "f32", 1024, 128256, against_torch(9, share(0.70), Target("torch", 1.5, OURS_NUMPY)), headline=True),
    Case("loss", "bf16", 1024, 128256, against_torch(6, share(0.45)), headline=True),
    Case("loss", "f16", 1024, 128256, against_torch(6, share(0.45)), headline=True),
    Case("grad", "f32", 1024, 128256, against_torch(9), headline=True),
    Case("grad", "bf16", 1024, 128256, against_torch(7), headline=True),
    Case("grad", "f16", 1024, 128256, against_torch(7)),
    Case("inplace", "f32", 1024, 128256, against_torch(9, share(0.75)), headline=True),
    Case("inplace", "bf16", 1024, 128256, against_torch(7)),
    # Few rows: what a call costs, and whether a single row uses all cores.
    Case("loss", "f32", 1, 128256, against_torch(1.1), headline=True),
    Case("loss", "f32", 2, 128256, against_torch(1.1)),
    Case("loss", "f32", 4, 128256, against_torch(1.1)),
    Case("loss", "f32", 8, 128256, against_torch(1.1)),
    Case("loss", "bf16", 8, 128256),
    Case("grad", "f32", 8, 128256),
    # On both sides of MALLOC_STEP.
    Case("loss", "f32", 64, 128256),
    Case("loss", "f32", 72, 128256),
    # Small vocabularies: the work per row counts.
    Case("loss", "f32", 8192, 256),
    Case("loss", "f32", 8192, 1000, against_torch(1.3), headline=True),
    Case("loss", "f32", 32768, 1024, against_torch(4), headline=True),
    Case("loss", "bf16", 32768, 1024),
    Case("grad", "f32", 8192, 1000),
    Case("loss", "f32", 8192, 4096),
    # Other vocabularies: Llama 2, GPT-2 (odd: rows are not aligned), Gemma.
    Case("loss", "f32", 2048, 32000),
    Case("loss", "bf16", 8192, 32000),
    Case("loss", "f32", 1024, 50257),
    Case("grad", "bf16", 1024, 50257),
    Case("loss", "f32", 256, 262144),
    Case("loss", "bf16", 512, 262144),
    # Other work.
    Case("soft", "f32", 256, 128256, headline=True),
    Case("soft", "bf16", 1024, 32000),
    Case("pairs", "f32", 256, 128256),
    Case("pairs", "bf16", 512, 128256),
    Case("binary", "f32", 8192, 1000),
    Case("binary", "f32", 4096, 8192, headline=True),
    Case("logsumexp", "f32", 256, 128256),
    Case("logsumexp", "bf16", 1024, 32000),
    Case("softmax", "f32", 256, 128256, headline=True),
    Case("softmax", "bf16", 1024, 32000),
)

# Every task and dtype once, at sizes that say whether all is well, not how fast it is.
QUICK = (
    Case("loss", "f32", 64, 32000),
    Case("loss", "f16", 64, 32000),
    Case("grad", "bf16", 64, 32000),
    Case("inplace", "f32", 64, 32000),
    Case("soft", "f32", 64, 32000),
    Case("pairs", "f32", 64, 32000),
    Case("binary", "f32", 2048, 1000),
    Case("logsumexp", "f32", 64, 32000),
    Case("softmax", "f32", 64, 32000),
)
