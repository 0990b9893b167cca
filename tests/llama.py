"""llama.cpp's `.kld` file and its statistics, row by row as its perplexity.cpp has them; nothing of gpuxent is used."""

import math
import struct

import numpy as np

F = np.float32


def nearest_int(value):
    """Adding 1.5 * 2**23 leaves no bits for a fraction."""
    bits = (F(value) + F(12582912)).view(np.int32)
    return int(bits & np.int32(0x007FFFFF)) - 0x00400000


def record(logits):
    """float scale, float min_log_prob, uint16 codes, and one more if they are odd in number."""
    logits = [F(x) for x in logits]
    top, low = max(logits), max(min(logits), max(logits) - F(16))
    sum_exp = 0.0
    for x in logits:
        sum_exp += math.exp(x - top)
    min_log_prob = (low - top) - F(math.log(sum_exp))
    scale = (top - low) / F(65535)
    codes = [0] * len(logits)
    if scale:
        inverse = F(1) / scale
        codes = [nearest_int(inverse * (x - low)) if x > low else 0 for x in logits]
    return struct.pack(f"<ff{len(codes)}H", scale, min_log_prob, *codes) + b"\0\0" * (len(codes) % 2)


def write(path, logits, tokens):
    """Logits (windows, n_ctx - 1 - n_ctx // 2, vocab) and tokens (windows, n_ctx)."""
    windows, n_ctx = tokens.shape
    with open(path, "wb") as file:
        file.write(b"_logits_" + struct.pack("<iii", n_ctx, logits.shape[2], windows))
        file.write(struct.pack(f"<{tokens.size}i", *tokens.ravel().tolist()))
        for window in logits:
            for row in window:
                file.write(record(row))
    return path


class Statistics:
    """What `llama-perplexity --kl-divergence` prints, of a file and the logits of another model for its rows; the
    accumulators are its own."""

    def __init__(self, path, other):
        data = path.read_bytes()
        assert data[:8] == b"_logits_"
        n_ctx, n_vocab, n_chunk = struct.unpack_from("<iii", data, 8)
        tokens = struct.unpack_from(f"<{n_chunk * n_ctx}i", data, 20)
        at, nv = 20 + 4 * n_chunk * n_ctx, 2 * ((n_vocab + 1) // 2) + 4
        self.nll, self.nll_base, self.kld, self.p_diff, self.kept, self.same = [], [], [], [], [], 0
        row = 0
        for chunk in range(n_chunk):
            for i in range(n_ctx // 2, n_ctx - 1):
                scale, low = struct.unpack_from("<ff", data, at)
                codes = struct.unpack_from(f"<{n_vocab}H", data, at + 8)
                self.add([scale * code + low for code in codes], other[row].tolist(), tokens[chunk * n_ctx + i + 1])
                at, row = at + 2 * nv, row + 1
        assert at == len(data)

    def add(self, base, logits, token):
        top = max(logits)
        normalizer = top + math.log(math.fsum(math.exp(x - top) for x in logits))
        self.nll.append(normalizer - logits[token])
        self.nll_base.append(-base[token])
        self.same += logits.index(top) == base.index(max(base))
        terms = [math.exp(p) * (p - x + normalizer) for p, x in zip(base, logits, strict=True) if p > -16]
        self.kld.append(math.fsum(terms))
        self.p_diff.append(math.exp(-self.nll[-1]) - math.exp(-self.nll_base[-1]))
        low = min(base) if max(base) - min(base) > 15.999 else -math.inf
        kept = [i for i, p in enumerate(base) if p > low or i == token]
        self.kept.append([math.fsum(math.exp(x[i] - n) for i in kept) for x, n in ((base, 0), (logits, normalizer))])

    def gaps(self):
        """Of each row the probability that other has in the classes that base keeps, less that of base."""
        return [other - base for base, other in self.kept]

    def mean(self, values):
        """(mean, its uncertainty) as mean_and_uncertainty has it, but without E[x**2] - E[x]**2."""
        mean = math.fsum(values) / len(values)
        return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / len(values) / (len(values) - 1))

    def covariance(self):
        (a, _), (b, _), n = self.mean(self.nll), self.mean(self.nll_base), len(self.nll)
        return math.fsum((x - a) * (y - b) for x, y in zip(self.nll, self.nll_base, strict=True)) / n / (n - 1)

    def percentile(self, values, fraction):
        values = sorted(values)
        p = fraction * (len(values) - 1)
        place = int(p)
        p -= place
        return (1 - p) * values[place] + p * values[min(place + 1, len(values) - 1)]

    def shown(self):
        """name -> (value, uncertainty)"""
        (q, q_unc), (base, base_unc), covariance = self.mean(self.nll), self.mean(self.nll_base), self.covariance()
        ratio, ratio_unc = q - base, math.sqrt(q_unc**2 + base_unc**2 - 2 * covariance)
        ppl, ppl_base = math.exp(q), math.exp(base)
        difference = math.sqrt((ppl * q_unc) ** 2 + (ppl_base * base_unc) ** 2 - 2 * ppl * ppl_base * covariance)
        square, square_unc = self.mean([x * x for x in self.p_diff])
        same, n = self.same / len(self.nll), len(self.nll)
        return {
            "other_perplexity": (ppl, ppl * q_unc),
            "base_perplexity": (ppl_base, ppl_base * base_unc),
            "log_ratio": (ratio, ratio_unc),
            "ratio": (math.exp(ratio), math.exp(ratio) * ratio_unc),
            "difference": (ppl - ppl_base, difference),
            "kl": self.mean(self.kld),
            "delta_p": self.mean(self.p_diff),
            "delta_p_rms": (math.sqrt(square), 0.5 / math.sqrt(square) * square_unc),
            "same_top": (same, math.sqrt(same * (1 - same) / (n - 1))),
            "correlation": (covariance / (q_unc * base_unc), None),
        }
