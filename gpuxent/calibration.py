"""How far to trust a model's probabilities, and how to mend them; see `gpuxent.evaluation.calibration`."""

from gpuxent.evaluation.calibration import TemperatureFit, fit_temperature, reliability, reliability_of_run
from gpuxent.evaluation.reliability import Estimate, Reliability, ReliabilityBin

__all__ = [
    "Estimate",
    "Reliability",
    "ReliabilityBin",
    "TemperatureFit",
    "fit_temperature",
    "reliability",
    "reliability_of_run",
]
