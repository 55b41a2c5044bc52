"""`reference/m_mate.py` on the fast branches: same constructor, parameters, names and results.

Letters: B batch, L tokens, D width.
"""

from __future__ import annotations

from torch import Tensor

from linmu import reference

from .elementwise.operator import MixInputs, mix_branches
from .engine import engine_of_block
from .engine.torch_state import has_no_hooks
from .flex_ma import FlexMA, FlexMAState
from .layout import VisionLayout, fast
from .local_swin import LocalSwin
from .projections import are_plain, narrow_products

__all__ = ["MMATE"]


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
        state: FlexMAState | None = None,
    ) -> tuple[Tensor, FlexMAState]:
        """`linmu.reference.MMATE.forward`: arguments, result and errors are the same.

        Both branches' outputs are mixed in one pass. One output product over both branches' heads, scaled
        before it, would read and write as many bytes per token, and could not be adapted by branch.
        """
        flex_ma, angles = self.flex_ma, position_embeddings
        if layout is None or not self.runs_in_parts():
            y, state = flex_ma(hidden_states, layout, valid=valid, position_embeddings=angles, state=state)
            if layout is None:
                return y, state
            local = self.local_swin(hidden_states, layout, position_embeddings=angles)
            (mix,), row, engine = (
                narrow_products(hidden_states, [self.mix_proj]),
                fast(layout).vision_row,
                None,
            )
        else:
            engine = engine_of_block("MMATE", hidden_states, self.config.head_dim)
            linears = [flex_ma.dt_proj, flex_ma.scan_gate_proj, self.mix_proj]
            *rates, mix = narrow_products(hidden_states, linears)
            y, state = flex_ma.heads(hidden_states, layout, valid, angles, state, engine, rates)
            y = flex_ma.o_proj(y)
            local, row = self.local_swin.attend(hidden_states, layout, angles, engine)
        return mix_branches(MixInputs(y, local, mix, row, engine)), state

    def runs_in_parts(self) -> bool:
        """Whether the branches may be run in parts, so that their narrow products read the hidden states
        once: no hooks on them, no adapted or offloaded projections, no other forward.
        """
        if self.config.text_only:
            return False
        branches = ((self.flex_ma, FlexMA), (self.local_swin, LocalSwin))
        own = all(has_no_hooks(branch) and type(branch).forward is kind.forward for branch, kind in branches)
        return own and are_plain([self.flex_ma.dt_proj, self.flex_ma.scan_gate_proj, self.mix_proj])
