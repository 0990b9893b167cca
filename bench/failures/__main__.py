"""All failures, or those that are named: `python -m bench.failures --help`."""

from __future__ import annotations

import argparse

from bench.failures import (
    block_means,
    calibration_counts,
    clipped_log_loss,
    float16_means,
    frame,
    negative_label,
    perplexity_counts,
    softmax_then_log,
)

MODULES = (
    softmax_then_log,
    perplexity_counts,
    calibration_counts,
    block_means,
    float16_means,
    clipped_log_loss,
    negative_label,
)
FAILURES = {module.FAILURE.name: module.FAILURE for module in MODULES}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.failures",
        description="The field's silent failures beside gpuxent and the truth. Exits with 1 if gpuxent is wrong.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(FAILURES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="what is slow, smaller: seconds instead of minutes")
    chosen = parser.parse_args(arguments)
    for name in chosen.names:
        if name not in FAILURES:
            parser.error(f"there is no {name!r}; there are {', '.join(FAILURES)}")
    return frame.report([FAILURES[name] for name in chosen.names or FAILURES], chosen.quick)


if __name__ == "__main__":
    raise SystemExit(main())
