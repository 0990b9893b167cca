"""What is measured on a GPU, and how good it has to be (section 6 of the design).

Logits are about 2 GB, many times any L2. Cases of the same data follow one another, so that they are made once, and
what matters most comes first: a run may end before the last case.
"""

from __future__ import annotations

from bench.cases import COPY, Case, Target, share

# rows of 2-byte logits by vocabulary; half as many of float32
ROWS = {
    128256: 8192,  # Llama 3
    32000: 32768,  # Llama 2
    256000: 4096,  # Gemma
    50257: 16384,  # GPT-2: rows are not aligned
    151936: 6144,  # Qwen 2
    65536: 16384,
    16384: 65536,
    4096: 262144,
    1000: 1 << 20,
    256: 1 << 22,
}
FEW = (1, 4, 16, 64)

FEW_ROWS = (Target("torch compiled", 2),)


def of_vocabulary(vocab: int) -> list[Case]:
    """Loss and gradient in place in all dtypes; the rest where it tells something new."""
    many, fewer = ROWS[vocab], ROWS[vocab] // 2
    small, known = vocab <= 4096, vocab in (128256, 1000)
    loss = (Target(COPY, 0.75 if small else 0.92),)
    gradient = (share(0.75 if small else 0.88),)
    cases = [
        Case("loss", "bf16", many, vocab, loss, headline=True),
        Case("inplace", "bf16", many, vocab, gradient, headline=True, compiling=vocab in (128256, 1000, 32000)),
        Case("grad", "bf16", many, vocab, compiling=known),
    ]
    if vocab in (128256, 50257, 32000, 1000):
        cases.append(Case("separate", "bf16", many, vocab, compiling=False))
    cases += [
        Case("loss", "f32", fewer, vocab, loss if small else (), headline=known, compiling=known),
        Case("inplace", "f32", fewer, vocab, headline=known, compiling=False),
    ]
    if known:
        cases.append(Case("grad", "f32", fewer, vocab, compiling=False))
    cases.append(Case("loss", "f16", many, vocab, compiling=False))
    if vocab in (128256, 50257, 1000):
        cases.append(Case("inplace", "f16", many, vocab, compiling=False))
    return cases


def of_few_rows() -> list[Case]:
    """What a call costs, and whether a single row uses the whole device."""
    vocab = 128256
    cases = [Case("loss", "bf16", rows, vocab, FEW_ROWS, headline=True) for rows in FEW]
    cases += [Case("loss", "f32", rows, vocab, compiling=False) for rows in (1, 64)]
    cases += [Case("inplace", "bf16", rows, vocab, compiling=rows == 16) for rows in (1, 16, 64)]
    return cases


ALL = {vocab: of_vocabulary(vocab) for vocab in ROWS}
CASES = (
    *ALL.pop(128256),
    *ALL.pop(1000),
    *of_few_rows(),
    *(case for cases in ALL.values() for case in cases),
    Case("softmax", "bf16", 8192, 128256, compiling=False),
    Case("logsumexp", "bf16", 8192, 128256, compiling=False),
    Case("soft", "bf16", 4096, 128256, compiling=False),
    Case("pairs", "bf16", 4096, 128256, compiling=False),
    Case("pairs", "f32", 2048, 128256, compiling=False),
    Case("pairs", "bf16", 131072, 4096, compiling=False),
    Case("pairs", "bf16", 4, 128256, compiling=False),
    Case("binary", "f32", 32768, 8192, compiling=False),
)

# Every kind of kernel once, at sizes that say whether all is well, not how fast it is.
QUICK = (
    Case("loss", "bf16", 1024, 128256),
    Case("inplace", "bf16", 1024, 128256, compiling=False),
    Case("separate", "bf16", 1024, 128256, compiling=False),
    Case("loss", "f16", 4096, 50257, compiling=False),
    Case("grad", "f32", 4096, 32000, compiling=False),
    Case("loss", "bf16", 131072, 1000, compiling=False),
    Case("inplace", "f32", 131072, 256, compiling=False),
    Case("loss", "bf16", 4, 128256, compiling=False),
    Case("soft", "bf16", 1024, 32000, compiling=False),
    Case("pairs", "bf16", 1024, 32000, compiling=False),
    Case("binary", "f32", 4096, 8192, compiling=False),
    Case("logsumexp", "f32", 4096, 32000, compiling=False),
    Case("softmax", "bf16", 4096, 32000, compiling=False),
)
