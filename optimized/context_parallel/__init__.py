"""M-MATE of a prompt that is split over processes, without gradients, in as few passes as in one process.

Letters: B batch, n tokens of this rank, D width, H heads. Numbers are those of the reference's `m_mate`; what
differs is how often tokens are read. Those that the scan order takes to another rank are exchanged in place,
and the convolution and the scan read and write by the order of what is there. States enter between the scan's
two steps, so its norm stays part of it. Windows that no cut goes through are computed where they are. An
exchange is under way while what does not need it is computed.
"""

from __future__ import annotations

from torch import Tensor

from ...reference.m_mate import MMATEState
from ...reference.student.context_parallel import ContextParallel
from ..elementwise.operator import MixInputs, mix_branches
from ..engine import engine_of_block
from ..layout import VisionLayout, fast, rows_where
from .flex_ma import FlexMAPart
from .local_swin import LocalPart

Angles = tuple[Tensor, Tensor] | None


def m_mate(
    parallel: ContextParallel,
    block,
    u: Tensor,
    layout: VisionLayout | None,
    valid: Tensor | None,
    angles: Angles,
    state: MMATEState | None,
) -> tuple[Tensor, MMATEState]:
    """`context_parallel.m_mate`, of rows that are one sample each."""
    layout, engine = fast(layout), engine_of_block("MMATE", u, block.config.head_dim)
    flex = FlexMAPart(parallel, block, u, layout, valid, angles, engine)
    has_local = layout is not None or block.config.text_window > 0
    local = LocalPart(parallel, block.local_swin, u, layout, valid, angles, engine) if has_local else None
    before = (None, None, None) if state is None else (state.conv, state.scan, state.window)
    flex.scan(before[0])
    if local is not None:
        local.attend(before[2])
    y, after = flex.finish(before[1])
    if local is None:
        return flex.project_out(y, u), MMATEState(*after, before[2])
    near, window = local.project_out()
    y = flex.project_out(y, u)
    mixes = valid if block.config.text_window else layout.is_vision
    row = parallel.once("mixed rows", lambda: rows_where(parallel.local_or_none(mixes), u))
    return mix_branches(MixInputs(y, near, flex.mix, row, engine)), MMATEState(*after, window)
