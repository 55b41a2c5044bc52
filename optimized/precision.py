"""Nothing to speed up: `linmu.reference.precision`."""

from ..reference.numerics import accumulation_dtype, without_autocast

__all__ = ["accumulation_dtype", "without_autocast"]
