"""How far to trust a model's probabilities, and how to mend them; see `gpuxent.evaluation.calibration`."""

from gpuxent.evaluation.calibration import (
    check_temperature,
    classwise_reliability,
    fit_temperature,
    reliability,
    reliability_of_run,
)
from gpuxent.evaluation.reliability import ClasswiseReliability, Estimate, Reliability, ReliabilityBin
from gpuxent.evaluation.temperature import TemperatureCheck, TemperatureFit

__all__ = [
    "ClasswiseReliability",
    "Estimate",
    "Reliability",
    "ReliabilityBin",
    "TemperatureCheck",
    "TemperatureFit",
    "check_temperature",
    "classwise_reliability",
    "fit_temperature",
    "reliability",
    "reliability_of_run",
]
