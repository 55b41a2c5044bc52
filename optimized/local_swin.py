"""`reference/local_swin.py` on the fast window attention: same constructor, parameters, names and results.

Letters: B batch, L tokens, D width. Text has no part in it: its tokens are left out before the projections.
"""

from __future__ import annotations

from torch import Tensor

from linmu import reference

from .checks import require, require_shape
from .elementwise import torch_engine as mixing
from .layout import VisionLayout, fast
from .projections import checked_angles, rotated
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
        output, row = self.attend(hidden_states, layout, position_embeddings=position_embeddings)
        return mixing.taken(output, row) * layout.is_vision[..., None]

    def attend(
        self,
        hidden_states: Tensor,
        layout: VisionLayout,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Eqs. (1) and (2) of the tokens of `VisionLayout.vision_tokens`, (..., D), and their `row`."""
        require_shape("LocalSwin", "hidden_states", hidden_states, (None, None, self.config.width), "B, L, D")
        got = f"{tuple(layout.coords.shape[:2])} for {tuple(hidden_states.shape[:2])}"
        same = layout.coords.shape[:2] == hidden_states.shape[:2]
        require(same, "LocalSwin", "layout must describe the same (B, L) as hidden_states", got)
        tokens = fast(layout).vision_tokens(self.config.window_thw, self.layer_index)
        heads = hidden_states.new_empty(0, hidden_states.shape[1], 1, self.config.head_dim)  # what angles fit
        angles = checked_angles(heads, position_embeddings)
        q, k, v = self.project_heads(tokens.taken(hidden_states))
        q, k = rotated(q, angles, tokens.token), rotated(k, angles, tokens.token)
        output = planned_attention(q, k, v, tokens.window_id, tokens.plan)
        return self.o_proj(output.flatten(2)), tokens.row
