"""One case: make the data, ask every contender, compare with the oracle, and only then time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import perf_counter

from bench import limits, oracle
from bench.cases import OURS, OURS_NUMPY, Case
from bench.memory import peak_growth
from bench.problems import Answer, Problem, make
from bench.results import CaseResult, Measurement, judged
from bench.rivals import CONTENDERS, Prepare, Prepared, Refused, forget_compiled
from bench.timing import Plan, Spread, Timed, interleaved

FULL = Plan(seconds=8, least=5, most=30)
QUICK = Plan(seconds=1, least=3, most=10)

LIMIT = "limit"

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
    def admit(cls, name: str, prepare: Prepare, problem: Problem, truth: Answer) -> Candidate:
        prepared = prepare(problem)
        prepared.before()
        started = perf_counter()
        prepared.call()
        first_call = perf_counter() - started
        errors = oracle.errors(prepared.answer(), truth, problem.logits.dtype)
        prepared.before()
        return cls(name, prepared, first_call, errors, peak_growth(prepared.call))

    def measurement(self, times: Spread) -> Measurement:
        return Measurement(
            self.name,
            *times,
            first_call=self.first_call,
            peak_memory=self.peak_memory,
            mean_error=self.errors.mean,
            worst_error=self.errors.worst,
        )


def measure(
    case: Case,
    plan: Plan = FULL,
    say: Say = lambda what: None,
    left_out: Counter[str] | None = None,
    contenders: Mapping[str, Prepare] | None = None,
) -> CaseResult:
    """The case timed, or what is wrong with our answers to it.

    left_out: counts why a rival did not take part. contenders: all that are registered for the task, if not given.
    """
    forget_compiled()
    say("making the data")
    problem = make(case)
    say("asking the oracle")
    truth = oracle.answer(problem)
    contenders = CONTENDERS[case.task] if contenders is None else contenders
    candidates, faults = admitted(contenders, problem, truth, say, Counter() if left_out is None else left_out)
    if faults:
        return CaseResult.of(case, faults=faults)
    calls = {LIMIT: Timed(limits.limit_of(problem))}
    calls |= {each.name: Timed(each.prepared.call, each.prepared.before) for each in candidates}
    times = interleaved(calls, plan, tick=lambda name: say(f"timing {name}"))
    result = CaseResult.of(
        case,
        limit=Measurement(LIMIT, *times[LIMIT]),
        contenders=tuple(each.measurement(times[each.name]) for each in candidates),
    )
    return replace(result, verdicts=judged(result, case.targets))


def admitted(
    contenders: Mapping[str, Prepare], problem: Problem, truth: Answer, say: Say, left_out: Counter[str]
) -> tuple[list[Candidate], tuple[str, ...]]:
    """Those that can do the task, rivals however exact they are; and what is wrong with our own."""
    candidates, faults = [], []
    for name, prepare in contenders.items():
        say(f"checking {name}")
        ours = name in (OURS, OURS_NUMPY)
        try:
            candidate = Candidate.admit(name, prepare, problem, truth)
        except Exception as error:  # a rival may fail in its own way
            if ours:
                faults.append(f"{name}: {reason(error)}")
            else:
                left_out[f"{name}: {reason(error)}"] += 1
            continue
        candidates.append(candidate)
        if ours:
            faults += [f"{name}: {fault}" for fault in oracle.faults(candidate.errors, truth, problem.logits.dtype)]
    return candidates, tuple(faults)


def reason(error: Exception) -> str:
    """One line."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    first = next(iter(str(error).strip().splitlines()), "")
    return first if isinstance(error, Refused) else f"{type(error).__name__}: {first}"
