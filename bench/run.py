"""One case: make the data, ask every contender, compare with the oracle, and only then time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from bench import oracle
from bench.cases import LIMIT, OWN, Case
from bench.contenders import Prepare, Prepared, Refused, rotating
from bench.devices import Device
from bench.problems import Answer, Problem
from bench.results import CaseResult, Measurement, judged
from bench.timing import Plan, Spread, Timed, interleaved
from bench.torch_rivals import COMPILED

Say = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """A contender that has answered, and what is known of it before it is timed."""

    name: str
    prepared: Prepared
    first_call: float
    errors: oracle.Errors
    peak_memory: int | None

    @classmethod
    def admit(
        cls, name: str, prepare: Prepare, device: Device, problems: Sequence[Problem], truth: Answer
    ) -> Candidate:
        prepared = rotating(prepare, problems)
        prepared.before()
        device.wait()
        started = perf_counter()
        prepared.call()
        device.wait()
        first_call = perf_counter() - started
        errors = oracle.errors(prepared.answer(), truth, problems[0].logits.dtype)
        prepared.before()
        return cls(name, prepared, first_call, errors, device.peak_growth(prepared.call))

    @property
    def timed(self) -> Timed:
        return Timed(self.prepared.call, self.prepared.before, self.prepared.calls)

    def measurement(self, times: Spread, busy: Spread | None) -> Measurement:
        return Measurement(
            self.name,
            *times,
            busy=busy and busy.median,
            first_call=self.first_call,
            peak_memory=self.peak_memory,
            mean_error=self.errors.mean,
            worst_error=self.errors.worst,
        )


def measure(
    case: Case,
    device: Device,
    plan: Plan | None = None,
    say: Say = lambda what: None,
    left_out: Counter[str] | None = None,
    contenders: Mapping[str, Prepare] | None = None,
) -> CaseResult:
    """The case timed, or what is wrong with our answers to it.

    left_out: counts why a rival did not take part. contenders: all that the device has for the task, if not given.
    """
    device.forget()
    say("making the data")
    problems = device.make(case)
    say("asking the oracle")
    truth = oracle.answer(problems[0])
    contenders = taking_part(case, device) if contenders is None else contenders
    left_out = Counter() if left_out is None else left_out
    candidates, faults = admitted(contenders, device, problems, truth, say, left_out)
    if faults:
        return CaseResult.of(case, faults=faults)
    limits = device.limits(problems)
    calls = {**limits, **{each.name: each.timed for each in candidates}}
    plan = device.plan if plan is None else plan
    times = interleaved(calls, plan, device.turn, tick=lambda name: say(f"timing {name}"))
    busy: Mapping[str, Spread] = {}
    if device.busy_turn is not None:
        busy = interleaved(calls, plan, device.busy_turn, seed=1, tick=lambda name: say(f"timing {name}, queued"))
    plain = {name: Measurement(name, *times[name], busy=busy[name].median if name in busy else None) for name in limits}
    result = CaseResult.of(
        case,
        limit=plain.pop(LIMIT),
        contenders=(
            *(each.measurement(times[each.name], busy.get(each.name)) for each in candidates),
            *plain.values(),
        ),
    )
    return replace(result, verdicts=judged(result, case.targets))


def taking_part(case: Case, device: Device) -> dict[str, Prepare]:
    of_task = device.contenders[case.task]
    return {name: prepare for name, prepare in of_task.items() if case.compiling or name not in COMPILED}


def admitted(
    contenders: Mapping[str, Prepare],
    device: Device,
    problems: Sequence[Problem],
    truth: Answer,
    say: Say,
    left_out: Counter[str],
) -> tuple[list[Candidate], tuple[str, ...]]:
    """Those that can do the task, rivals however exact they are; and what is wrong with our own."""
    candidates, faults = [], []
    for name, prepare in contenders.items():
        say(f"checking {name}")
        ours = name in OWN
        try:
            candidate = Candidate.admit(name, prepare, device, problems, truth)
        except Exception as error:  # a rival may fail in its own way
            if ours:
                faults.append(f"{name}: {reason(error)}")
            else:
                left_out[f"{name}: {reason(error)}"] += 1
            continue
        candidates.append(candidate)
        if ours:
            faults += [f"{name}: {fault}" for fault in oracle.faults(candidate.errors, truth, problems[0].logits.dtype)]
    return candidates, tuple(faults)


def reason(error: Exception) -> str:
    """One line."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    first = next(iter(str(error).strip().splitlines()), "")
    return first if isinstance(error, Refused) else f"{type(error).__name__}: {first}"
