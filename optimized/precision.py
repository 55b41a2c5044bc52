"""Nothing to speed up: `linmu.reference.precision`."""

from ..reference.precision import accumulation_dtype, without_autocast

__all__ = ["accumulation_dtype", "without_autocast"]
