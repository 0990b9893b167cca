"""How far to trust a model's probabilities, and how to mend them; see `gpuxent.evaluation.calibration`."""

from gpuxent.evaluation.calibration import TemperatureFit, fit_temperature

__all__ = ["TemperatureFit", "fit_temperature"]
