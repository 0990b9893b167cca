"""What a run leaves behind, and its way to JSON and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from bench.cases import LIMIT, OURS, Case, Target

FORMAT = 1


@dataclass(frozen=True)
class Measurement:
    """One contender (or the limit) in one case. Times in seconds, memory in bytes, relative errors."""

    name: str
    median: float
    low: float  # quartiles of the rounds
    high: float
    rounds: int
    busy: float | None = None  # seconds for which the device is at work with one call, its queue kept full
    first_call: float | None = None  # compiling included
    peak_memory: int | None = None
    mean_error: float | None = None
    worst_error: float | None = None


@dataclass(frozen=True)
class Verdict:
    against: str
    at_least: float
    ours: str
    reached: float

    @property
    def met(self) -> bool:
        return self.reached >= self.at_least


@dataclass(frozen=True)
class CaseResult:
    """`faults` says what was wrong with our own contenders; then nothing was timed."""

    name: str
    task: str
    dtype: str
    rows: int
    vocab: int
    traffic: int
    headline: bool
    limit: Measurement | None = None
    contenders: tuple[Measurement, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    faults: tuple[str, ...] = ()

    @classmethod
    def of(cls, case: Case, **found: Any) -> CaseResult:
        return cls(case.name, case.task, case.dtype, case.rows, case.vocab, case.traffic, case.headline, **found)

    def contender(self, name: str) -> Measurement | None:
        return next((found for found in self.contenders if found.name == name), None)

    def share_of_limit(self, measured: Measurement) -> float:
        assert self.limit is not None
        return self.limit.median / measured.median

    def speedup(self, over: str, ours: str = OURS) -> float | None:
        """How many times as fast as `over` ours is; None where one of them did not take part."""
        rival, own = self.contender(over), self.contender(ours)
        return rival.median / own.median if rival and own else None


def judged(result: CaseResult, targets: tuple[Target, ...]) -> tuple[Verdict, ...]:
    """What has become of the targets; those whose contenders did not take part are left out."""
    verdicts = []
    for target in targets:
        own = result.contender(target.ours)
        if target.against == LIMIT:
            reached = result.share_of_limit(own) if own else None
        else:
            reached = result.speedup(target.against, target.ours)
        if reached is not None:
            verdicts.append(Verdict(target.against, target.at_least, target.ours, reached))
    return tuple(verdicts)


@dataclass(frozen=True)
class Run:
    device: Mapping[str, Any]
    versions: Mapping[str, str]
    commit: Mapping[str, Any]
    date: str
    command: str
    cases: tuple[CaseResult, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)  # "contender: reason", and in how many cases

    @property
    def failed(self) -> bool:
        return any(case.faults for case in self.cases)


# ---- JSON ----


def to_json(run: Run) -> str:
    return json.dumps(_plain({"format": FORMAT, **asdict(run)}), indent=1, allow_nan=False) + "\n"


def from_json(text: str) -> Run:
    """ValueError: text of another format."""
    found = json.loads(text)
    if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
        raise ValueError(f"not a benchmark result of format {FORMAT}")
    return Run(**{**found, "cases": tuple(_case(case) for case in found["cases"])})


def write(run: Run, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(run), encoding="utf-8")


def _case(found: dict[str, Any]) -> CaseResult:
    parts = {
        "limit": _measurement(found["limit"]) if found["limit"] else None,
        "contenders": tuple(map(_measurement, found["contenders"])),
        "verdicts": tuple(Verdict(**verdict) for verdict in found["verdicts"]),
        "faults": tuple(found["faults"]),
    }
    return CaseResult(**{**found, **parts})


def _measurement(found: dict[str, Any]) -> Measurement:
    numbers: dict[str, Any] = {key: float(value) if value == "inf" else value for key, value in found.items()}
    return Measurement(**numbers)


def _plain(value: Any) -> Any:
    """Rounded to six digits, which is more than a clock gives; JSON has no infinity, so that is a string."""
    if isinstance(value, dict):
        return {key: _plain(of_key) for key, of_key in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if isfinite(value) else str(value)
    return value
