"""What was found, against what it has to be; as a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FORMAT = 1


@dataclass(frozen=True)
class Target:
    value: float
    at_most: bool = False

    def met_by(self, value: float) -> bool:
        return value <= self.value if self.at_most else value >= self.value

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.value:g}"


@dataclass(frozen=True)
class Figure:
    part: str
    what: str
    value: float
    unit: str
    target: Target | None = None
    more: dict[str, Any] = field(default_factory=dict)  # what it was made of, and what is worth knowing beside it

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.target.met_by(self.value)


@dataclass(frozen=True)
class Report:
    device: dict[str, Any]
    versions: dict[str, str]
    commit: dict[str, Any]
    date: str
    command: str
    figures: tuple[Figure, ...]


def to_json(report: Report) -> str:
    data = asdict(report)
    for plain, figure in zip(data["figures"], report.figures, strict=True):
        plain["met"] = figure.met
    return json.dumps(_rounded({"format": FORMAT, **data}), indent=1, allow_nan=False) + "\n"


def write(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(report), encoding="utf-8")


def show(report: Report, console: Console) -> None:
    """Targets that are missed say so; what has none is for information."""
    table = Table("part", "what", *(_right(name) for name in ("found", "target", "")), "beside it")
    last = ""
    for figure in report.figures:
        if figure.part != last and last:
            table.add_section()
        met = {None: "", True: "met", False: "MISSED"}[figure.met]
        beside = ", ".join(f"{name} {_short(value)}" for name, value in figure.more.items())
        found, target = f"{_short(figure.value)} {figure.unit}", "" if figure.target is None else str(figure.target)
        table.add_row("" if figure.part == last else figure.part, figure.what, found, target, met, beside)
        last = figure.part
    console.print(table)
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    cores = f", {report.device['cores']} cores" if "cores" in report.device else ""
    console.print(f"{report.device['model']}{cores}; {versions}", soft_wrap=True)


def _right(name: str) -> Any:
    from rich.table import Column

    return Column(name, justify="right", no_wrap=True)


def _short(value: Any) -> str:
    return (
        f"{value:,.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:,.0f}"
        if isinstance(value, (int, float))
        else str(value)
    )


def _rounded(value: Any) -> Any:
    """Six digits are more than a clock gives; JSON has no infinity and no NaN."""
    if isinstance(value, dict):
        return {key: _rounded(of_key) for key, of_key in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if isfinite(value) else str(value)
    return value
