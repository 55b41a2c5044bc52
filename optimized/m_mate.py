"""`reference/m_mate.py` on the fast branches: same constructor, parameters, names and results.

Letters: B batch, L tokens, D width.
"""

from __future__ import annotations

from torch import Tensor

from linmu import reference

from ..reference.m_mate import MMATEState
from .elementwise import operator as block_operators
from .flex_ma import FlexMA
from .layout import VisionLayout, every_row, fast, own_rows
from .local_swin import LocalSwin
from .projections import are_plain, is_unwatched, narrow_products

__all__ = ["MMATE", "MMATEState"]


class MMATE(reference.MMATE):
    """The M-MATE block: `linmu.reference.MMATE`, the same state dict."""

    flex_ma_class = FlexMA
    local_swin_class = LocalSwin

    def forward(
        self,
        hidden_states: Tensor,
        layout: VisionLayout | None = None,
        *,
        valid: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        state: MMATEState | None = None,
    ) -> tuple[Tensor, MMATEState]:
        """`linmu.reference.MMATE.forward`: arguments, result and errors are the same.

        Both branches' outputs are mixed in one pass. One output product over both branches' heads, scaled
        before it, would read and write as many bytes per token, and could not be adapted by branch.
        """
        flex_ma, local_swin = self.flex_ma, self.local_swin
        given = {"valid": valid, "position_embeddings": position_embeddings}
        before, window = (None, None) if state is None else (state.flex_ma, state.window)
        if layout is None or not self.reaches_into_branches():
            y, after = flex_ma(hidden_states, layout, state=before, **given)
            if layout is None and not self.config.text_window:
                return y, MMATEState(*after, window)
            local, window = local_swin(hidden_states, layout, state=window, **given)
            if self.config.text_window:
                row = every_row(y) if valid is None else own_rows(valid)
            else:
                row = fast(layout).vision_row
            (mix,) = narrow_products(hidden_states, [self.mix_proj])
        else:
            *rates, mix = narrow_products(
                hidden_states, [flex_ma.dt_proj, flex_ma.scan_gate_proj, self.mix_proj]
            )
            y, after = flex_ma.heads(hidden_states, layout, state=before, rates=rates, **given)
            y = flex_ma.o_proj(y)
            local, row, window = local_swin.attend(hidden_states, layout, state=window, **given)
        return block_operators.mix_branches(y, local, mix, row), MMATEState(*after, window)

    def reaches_into_branches(self) -> bool:
        """Whether the branches can be run in parts: nobody watches them, brings their weights, or changes
        them.
        """
        branches = ((self.flex_ma, FlexMA), (self.local_swin, LocalSwin))
        own = all(is_unwatched(branch) and type(branch).forward is kind.forward for branch, kind in branches)
        return own and are_plain([self.flex_ma.dt_proj, self.flex_ma.scan_gate_proj, self.mix_proj])
