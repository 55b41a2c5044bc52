"""Twin of `linmu.reference.calibration`: nothing to speed up."""

from ..reference.training.calibration import calibrate_norms

__all__ = ["calibrate_norms"]
