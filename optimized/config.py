"""Nothing to speed up: `linmu.reference.config`."""

from ..reference.config import LinMUConfig

__all__ = ["LinMUConfig"]
