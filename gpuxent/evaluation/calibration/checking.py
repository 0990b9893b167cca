"""What is fitted to some of the rows, and checked on the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Generic, TypeVar

from gpuxent import _arguments as arguments
from gpuxent.evaluation.calibration.held_out import PartJob
from gpuxent.evaluation.calibration.measuring import Measuring
from gpuxent.evaluation.calibration.passes import Passes
from gpuxent.evaluation.calibration.reliability import ClasswiseReliability, Reliability
from gpuxent.evaluation.calibration.scaling import MOST_CLASSES, Scaling, ScalingFit
from gpuxent.evaluation.calibration.scaling_job import ScalingJob, ScalingSums, best_scaling
from gpuxent.evaluation.calibration.temperature import SlopeJob, SlopeSums, TemperatureFit, best_temperature
from gpuxent.evaluation.job import Job
from gpuxent.evaluation.score import unchanged
from gpuxent.evaluation.sources import stored

METHODS = ("temperature", "vector", "matrix")

Fit = TypeVar("Fit", TemperatureFit, ScalingFit)


@dataclass(frozen=True)
class CalibrationCheck(Generic[Fit]):
    """What `check_temperature` and `check_scaling` return: what was fitted to one part of the rows, and the reliability
    of the other part before and after; of single classes too, if some were asked for."""

    fit: Fit
    before: Reliability
    after: Reliability
    classes_before: ClasswiseReliability | None = None
    classes_after: ClasswiseReliability | None = None

    @property
    def helps(self) -> bool:
        """Did both NLL and ECE fall on the rows held out?"""
        nll, ece = self.after.nll.value < self.before.nll.value, self.after.ece.value < self.before.ece.value
        return nll and ece

    def to_dict(self) -> dict[str, Any]:
        """For JSON: None for what is not finite, or was not asked for."""
        parts = {name: None if part is None else part.to_dict() for name, part in vars(self).items()}
        return parts | {"helps": self.helps}


@dataclass(frozen=True)
class Fitting:
    """One of METHODS, and what only a scaling wants to know."""

    method: str = "temperature"
    C: float = 1.0
    max_iter: int = 200

    @classmethod
    def scaling(cls, method: Any, C: Any, max_iter: Any = 200) -> Fitting:
        """ValueError or TypeError of one that cannot be."""
        arguments.one_of(method, "method", METHODS[1:])
        if float("inf") != C:
            arguments.number(C, "C", 0, open_low=True)
        if find_spec("scipy") is None:
            raise ModuleNotFoundError(f"{method} scaling needs SciPy: pip install 'gpuxent[sklearn]'")
        return cls(method, float(C), arguments.positive(max_iter, "max_iter"))

    def of(self, job: Job, passes: Passes) -> Any:
        """The TemperatureFit or ScalingFit of the rows of a job."""
        return temperature_of(job, passes) if self.method == "temperature" else self._scaling(job, passes)

    def _scaling(self, job: Job, passes: Passes) -> ScalingFit:
        classes = job.logits.shape[-1]
        if self.method == "matrix" and classes > MOST_CLASSES:
            raise ValueError(
                f"logits ({job.logits.name}) must have at most {MOST_CLASSES:,} classes for matrix scaling, which has "
                f"a parameter for every two of them, got {classes:,}; vector scaling has two for each"
            )
        start = Scaling.identity(self.method, classes, job.transform["softcap"])
        blocks = ScalingJob(**vars(replace(job, logits=stored(job.logits))), scaling=start)

        def at(scaling: Scaling, curved: bool) -> ScalingSums:
            return passes.total(replace(blocks, scaling=scaling, curved=curved), f"{self.method} scaling")

        return best_scaling(at, start, self.C, self.max_iter)


def temperature_of(job: Job, passes: Passes) -> TemperatureFit:
    """The best temperature of a job."""
    slopes = SlopeJob(**vars(job))

    def at(temperature: float) -> SlopeSums:
        heated = replace(slopes, transform=job.transform | {"temperature": temperature})
        return passes.total(heated, f"temperature {temperature:.4g}")

    return best_temperature(at)


def fitted(job: Job, fitting: Fitting, passes: Passes) -> Any:
    """To all rows, whose files must stay as they are meanwhile."""
    with unchanged(job):
        return fitting.of(job, passes)


def measure(
    job: Job, measuring: Measuring, passes: Passes, classes: Sequence[int] | None
) -> tuple[Reliability, ClasswiseReliability | None]:
    """As the rows are; of some classes, too."""
    if classes is not None:
        measuring.chosen(job, classes)  # before the work
    with unchanged(job):
        whole = measuring.reliability(job, passes)
        return whole, None if classes is None else measuring.by_class(job, passes, classes)


def check(
    job: Job,
    fitting: Fitting,
    measuring: Measuring,
    passes: Passes,
    *,
    held_out: Any,
    classes: Sequence[int] | None = None,
) -> CalibrationCheck:
    """On the share of documents that is held out."""
    share = arguments.number(held_out, "held_out", 0, 1, open_low=True)
    if classes is not None:
        measuring.chosen(job, classes)  # before the work
    part = PartJob(**vars(job), held_out=False, share=share, seed=measuring.how.seed)
    with unchanged(job):
        fit = fitting.of(part, passes)
        jobs = {"before": replace(part, held_out=True), "after": after(replace(part, held_out=True), fit)}
        found: dict[str, Any] = {name: measuring.reliability(one, passes, name) for name, one in jobs.items()}
        if classes is not None:
            for name, one in jobs.items():
                found[f"classes_{name}"] = measuring.by_class(one, passes, classes, f"classes {name}")
    return CalibrationCheck(fit, **found)


def after(job: PartJob, fit: TemperatureFit | ScalingFit) -> PartJob:
    """The job with logits that are mended."""
    if isinstance(fit, TemperatureFit):
        return replace(job, transform=job.transform | {"temperature": fit.temperature})
    return replace(job, logits=fit.apply(job.logits), transform={"softcap": None, "temperature": 1.0})
