"""How far to trust a model's probabilities, and how to mend them; see `gpuxent.evaluation.calibration.calibrate`."""

from gpuxent.evaluation.calibration.calibrate import (
    check_temperature,
    classwise_reliability,
    fit_temperature,
    reliability,
    reliability_of_run,
)
from gpuxent.evaluation.calibration.reliability import ClasswiseReliability, Estimate, Reliability, ReliabilityBin
from gpuxent.evaluation.calibration.temperature import TemperatureCheck, TemperatureFit

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
