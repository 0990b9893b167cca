"""How far to trust a model's probabilities, and how to mend them: see `gpuxent.evaluation.calibration`."""

from gpuxent.evaluation.calibration.calibrate import classwise_reliability, reliability, reliability_of_run
from gpuxent.evaluation.calibration.checking import CalibrationCheck
from gpuxent.evaluation.calibration.fitting import (
    check_scaling,
    check_temperature,
    fit_matrix_scaling,
    fit_temperature,
    fit_vector_scaling,
)
from gpuxent.evaluation.calibration.reliability import ClasswiseReliability, Interval, Reliability, ReliabilityBin
from gpuxent.evaluation.calibration.scaling import ScalingFit
from gpuxent.evaluation.calibration.temperature import TemperatureFit

__all__ = [
    "CalibrationCheck",
    "ClasswiseReliability",
    "Interval",
    "Reliability",
    "ReliabilityBin",
    "ScalingFit",
    "TemperatureFit",
    "check_scaling",
    "check_temperature",
    "classwise_reliability",
    "fit_matrix_scaling",
    "fit_temperature",
    "fit_vector_scaling",
    "reliability",
    "reliability_of_run",
]
