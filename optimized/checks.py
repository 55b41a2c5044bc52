"""Nothing to speed up: `linmu.reference.checks`."""

from ..reference.checks import (
    FLOAT_DTYPES,
    require,
    require_float,
    require_groups,
    require_int64,
    require_mask,
    require_one_device,
    require_shape,
)

__all__ = [
    "FLOAT_DTYPES",
    "require",
    "require_float",
    "require_groups",
    "require_int64",
    "require_mask",
    "require_one_device",
    "require_shape",
]
