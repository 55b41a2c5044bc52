"""`reference/local_swin.py` on the fast window attention: same constructor, parameters, names and results.

Letters: B batch, L tokens, D width.
"""

from __future__ import annotations

from torch import Tensor

from .. import reference
from .checks import require, require_shape
from .layout import VisionLayout, fast
from .projections import apply_rope
from .window_attention import planned_attention

__all__ = ["LocalSwin"]


class LocalSwin(reference.LocalSwin):
    """The local branch of M-MATE: `linmu.reference.LocalSwin`, the same state dict."""

    def forward(
        self,
        hidden_states: Tensor,
        layout: VisionLayout,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """`linmu.reference.LocalSwin.forward`: arguments, result and errors are the same."""
        output = self.attend(hidden_states, layout, position_embeddings=position_embeddings)
        return output * layout.is_vision[..., None]

    def attend(
        self,
        hidden_states: Tensor,
        layout: VisionLayout,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Eqs. (1) and (2), (B, L, D); on text the output's bias, which is nobody's."""
        require_shape("LocalSwin", "hidden_states", hidden_states, (None, None, self.config.width), "B, L, D")
        got = f"{tuple(layout.coords.shape[:2])} for {tuple(hidden_states.shape[:2])}"
        same = layout.coords.shape[:2] == hidden_states.shape[:2]
        require(same, "LocalSwin", "layout must describe the same (B, L) as hidden_states", got)
        q, k, v = self.project_heads(hidden_states)
        q, k = apply_rope(q, position_embeddings), apply_rope(k, position_embeddings)
        layout, where = fast(layout), (self.config.window_thw, self.layer_index)
        output = planned_attention(q, k, v, layout.windows(*where), layout.window_plan(*where))
        return self.o_proj(output.flatten(2))
