"""Nothing to speed up, the GEMMs are the library's: `linmu.reference.projections`."""

from ..reference.projections import HeadProjections, apply_rope, split_heads

__all__ = ["HeadProjections", "apply_rope", "split_heads"]
