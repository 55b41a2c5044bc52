"""`reference/m_mate.py` on the fast branches: same constructor, parameters, names and results."""

from __future__ import annotations

from .. import reference
from .flex_ma import FlexMA
from .local_swin import LocalSwin

__all__ = ["MMATE"]


class MMATE(reference.MMATE):
    """The M-MATE block: `linmu.reference.MMATE`, the same state dict."""

    flex_ma_class = FlexMA
    local_swin_class = LocalSwin
