"""A run for people: a table, a line per case, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.cases import ITEMSIZE, LIMIT, OURS, OURS_KERNEL, OURS_NUMPY, OWN, TASKS
from bench.results import CaseResult, Measurement, Run, Verdict

# PyTorch is quick where its N x V temporaries are smaller than this, and slow above: it is glibc's largest mmap
# threshold, below which malloc hands out the same pages again, and above which every call gets fresh ones.
MALLOC_STEP = 32 << 20

COLUMNS = ("", "median", "spread", "busy", "GB/s", "limit", "gpuxent", "memory", "worst", "mean", "first")
WIDTHS = (25, 8, 6, 8, 6, 5, 7, 7, 7, 7, 7)
LEGEND = """\
median    of the rounds, and spread: the distance between their quartiles, in percent of it
busy      (GPU) time for which the device is at work with one call, its queue kept full
GB/s      of the traffic that the task cannot avoid
limit     share of the speed at which this machine reads (or reads and writes) the same bytes with all it has
gpuxent   how many times as fast as this contender gpuxent is
memory    MB by which the peak grows during a call, its result included
worst     relative error of the worst sampled row; mean: of the mean loss
first     duration of the first call: compiling included, unless a cache on disk had it"""

# ---- words ----


def three_digits(value: float) -> str:
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{three_digits(seconds)} s"
    return f"{three_digits(seconds * 1e3)} ms" if seconds >= 1e-3 else f"{three_digits(seconds * 1e6)} us"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{three_digits(value)}x"


def error(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def verdict_text(verdict: Verdict) -> str:
    """ "11.2x torch (at least 9: met)"."""
    if verdict.against == LIMIT:
        reached = f"{verdict.reached:.2f} of the limit"
    else:
        reached = f"{ratio(verdict.reached)} {verdict.against}"
    who = "" if verdict.ours == OURS else f"{verdict.ours} "
    return f"{who}{reached} (at least {verdict.at_least:g}: {'met' if verdict.met else 'NOT MET'})"


def one_line(case: CaseResult) -> str:
    if case.faults:
        return f"{case.name}: FAILED"
    own = case.contender(OURS)
    if own is None:
        return f"{case.name}: done"
    speedup = case.speedup("torch")
    beside = f", {ratio(speedup)} torch" if speedup else ""
    return f"{case.name}: {duration(own.median)}, {case.share_of_limit(own):.2f} of the limit{beside}"


# ---- table ----


def show(run: Run, console: Console) -> None:
    console.print(rows([COLUMNS], "bold"))
    for case in run.cases:
        show_case(case, console)
    console.print(f"\n{LEGEND}\n", highlight=False)
    show_run(run, console)


def show_case(case: CaseResult, console: Console) -> None:
    if case.faults:
        console.print(Text(f"\n{case.name}: FAILED, not timed", "bold red"))
        for fault in case.faults:
            console.print(Text(f"  {fault}", "red"))
        return
    assert case.limit is not None
    kind = TASKS[case.task].limit
    what = f"{case.traffic / 1e6:.1f} MB; limit: {kind} in {duration(case.limit.median)}"
    console.print(Text.assemble("\n", (case.name, "bold"), f"  {what}, {gigabytes(case, case.limit)} GB/s"))
    own = [each for each in case.contenders if each.name in OWN]
    rivals = [each for each in case.contenders if each not in own]
    console.print(rows([cells(case, each) for each in own], "green"))
    console.print(rows([cells(case, each) for each in rivals], ""))
    for verdict in case.verdicts:
        console.print(Text(f"  target: {verdict_text(verdict)}", "green" if verdict.met else "red"))


def cells(case: CaseResult, of: Measurement) -> tuple[str, ...]:
    return (
        f"  {of.name}",
        duration(of.median),
        f"{100 * (of.high - of.low) / of.median:.0f}%",
        "" if of.busy is None else duration(of.busy),
        gigabytes(case, of),
        f"{case.share_of_limit(of):.2f}",
        ratio(case.speedup(of.name)) if of.name != OURS else "",
        "" if of.peak_memory is None else f"{of.peak_memory / 1e6:.1f}",
        error(of.worst_error),
        error(of.mean_error),
        "" if of.first_call is None else duration(of.first_call),
    )


def gigabytes(case: CaseResult, of: Measurement) -> str:
    return three_digits(case.traffic / of.median / 1e9)


def rows(lines: list[tuple[str, ...]], style: str) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, width in zip(COLUMNS, WIDTHS, strict=True):
        table.add_column(width=width + 2 if not name else width, justify="right" if name else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line, style=style)
    return table


def show_run(run: Run, console: Console) -> None:
    """Where and with what, who was left out, and how many targets were met."""
    console.print(describe(run.device), highlight=False)
    console.print(", ".join(f"{name} {number}" for name, number in run.versions.items()), highlight=False)
    state = " with changes" if run.commit.get("dirty") else ""
    console.print(f"commit {run.commit.get('id', 'unknown')[:10]}{state}, {run.date}", highlight=False)
    for why, count in run.left_out.items():
        console.print(f"left out of {count} {'case' if count == 1 else 'cases'}: {why}", markup=False, highlight=False)
    for line in regimes(run):
        console.print(line, highlight=False)
    verdicts = [verdict for case in run.cases for verdict in case.verdicts]
    if verdicts:
        console.print(f"targets met: {sum(verdict.met for verdict in verdicts)} of {len(verdicts)}", highlight=False)
    for case in run.cases:
        if case.faults:
            console.print(Text(f"FAILED: {case.name}", "red"))


def describe(device: Mapping[str, Any]) -> str:
    """ "NVIDIA H200, 132 multiprocessors, memory 140 GiB, L2 60M, driver ..." """
    counted = [f"{device[what]} {what}" for what in ("cores", "multiprocessors") if what in device]
    named = [f"{what} {device[what]}" for what in ("memory", "driver", "CUDA") if what in device]
    caches = [f"{level} {size}" for level, size in device["caches"].items()]
    return ", ".join([device["model"], *counted, *caches, *named])


def regimes(run: Run) -> list[str]:
    """How gpuxent compares with PyTorch on a CPU where malloc is kind to it, and where it is not."""
    if "cores" not in run.device:
        return []
    sides: dict[str, list[float]] = {"below": [], "above": []}
    for case in run.cases:
        speedup = case.speedup("torch")
        if speedup is not None:
            logits_bytes = case.rows * case.vocab * ITEMSIZE[case.dtype]
            sides["below" if logits_bytes < MALLOC_STEP else "above"].append(speedup)
    return [
        f"torch, logits {side} {MALLOC_STEP >> 20} MiB (malloc's step): gpuxent is {ratio(median(found))} as fast, "
        f"median of {len(found)} cases ({ratio(min(found))} to {ratio(max(found))})"
        for side, found in sides.items()
        if found
    ]


# ---- picture ----


def draw(run: Run, path: Path) -> None:
    """Two panels with a line per case: share of the limit, and speed relative to each rival (log)."""
    from matplotlib.figure import Figure

    cases = [case for case in run.cases if not case.faults]
    figure = Figure(figsize=(13, 1.8 + 0.28 * len(cases)), layout="constrained")
    shares, ratios = figure.subplots(1, 2, sharey=True, width_ratios=(2, 3))
    draw_shares(shares, cases)
    draw_ratios(ratios, cases)
    for axes in (shares, ratios):
        axes.set_yticks(range(len(cases)), [case.name for case in cases], fontsize=8, family="monospace")
        axes.set_ylim(len(cases) - 0.5, -0.5)
        axes.grid(axis="y", color="0.92")
        axes.grid(axis="x", color="0.85")
        axes.set_axisbelow(True)
        axes.axvline(1, color="black", linewidth=1)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.03), ncols=4, fontsize=8, frameon=False)
    known = ("torch", "triton", "jax", "numba", "cupy-cuda12x", "cupy-cuda13x")
    versions = ", ".join(f"{name} {run.versions[name]}" for name in known if name in run.versions)
    figure.suptitle(f"{describe(run.device)}; {versions}; {run.date}", fontsize=9)
    figure.savefig(path, dpi=130)


def draw_shares(axes: Any, cases: list[CaseResult]) -> None:
    for name, colour in ((OURS, "tab:green"), (OURS_NUMPY, "tab:gray"), (OURS_KERNEL, "tab:olive")):
        points = [(case.share_of_limit(own), y) for y, case in enumerate(cases) if (own := case.contender(name))]
        if points:
            axes.scatter(*zip(*points, strict=True), s=36, color=colour, label=name, zorder=3)
    draw_targets(axes, cases, lambda verdict: verdict.against == LIMIT)
    axes.set_xlim(0, max(1.05, axes.get_xlim()[1]))
    axes.set_xlabel("share of the speed of a plain read or copy of the same bytes")


def draw_ratios(axes: Any, cases: list[CaseResult]) -> None:
    names = dict.fromkeys(each.name for case in cases for each in case.contenders if each.name != OURS)
    markers = "osD^v<>P*X"
    for marker, name in zip(markers, names, strict=False):
        points = [(speedup, y) for y, case in enumerate(cases) if (speedup := case.speedup(name))]
        if points:
            axes.scatter(*zip(*points, strict=True), s=26, marker=marker, label=name, alpha=0.85, zorder=3)
    draw_targets(axes, cases, lambda verdict: verdict.against != LIMIT and verdict.ours == OURS)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.set_xlabel("gpuxent is this many times as fast as")


def draw_targets(axes: Any, cases: list[CaseResult], chosen: Callable[[Verdict], bool]) -> None:
    points = [(v.at_least, y) for y, case in enumerate(cases) for v in case.verdicts if chosen(v)]
    if points:
        axes.scatter(*zip(*points, strict=True), s=150, marker="|", color="red", label="target", zorder=4)
