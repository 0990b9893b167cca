"""How far to trust a model's probabilities, and how to mend them; see `gpuxent.evaluation.calibration`."""

from gpuxent.evaluation.calibration import classwise_reliability, fit_temperature, reliability, reliability_of_run
from gpuxent.evaluation.reliability import ClasswiseReliability, Estimate, Reliability, ReliabilityBin
from gpuxent.evaluation.temperature import TemperatureFit

__all__ = [
    "ClasswiseReliability",
    "Estimate",
    "Reliability",
    "ReliabilityBin",
    "TemperatureFit",
    "classwise_reliability",
    "fit_temperature",
    "reliability",
    "reliability_of_run",
]
