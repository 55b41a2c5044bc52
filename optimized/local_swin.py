"""`reference/local_swin.py` on the fast attentions: same constructor, parameters, names and results.

Letters: B batch, L tokens, D width, n tokens of vision. Without a text window, text has no part in it: its
tokens are left out before the projections.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linmu import reference

from ..reference.sliding_window_attention import DonatedWindowState, WindowState
from .elementwise import torch_engine as mixing
from .flex_ma import may_be_overwritten
from .layout import VisionLayout, every_row, fast, own_rows
from .projections import checked_angles, rotated
from .sliding_window_attention import sliding_window_attention, step_in_place
from .window_attention import planned_attention

__all__ = ["LocalSwin"]


class LocalSwin(reference.LocalSwin):
    """The local branch of M-MATE: `linmu.reference.LocalSwin`, the same state dict."""

    def forward(
        self,
        hidden_states: Tensor,
        layout: VisionLayout | None = None,
        *,
        valid: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        state: WindowState | None = None,
    ) -> tuple[Tensor, WindowState | None]:
        """`linmu.reference.LocalSwin.forward`: arguments, results and errors are the same."""
        given = {"valid": valid, "position_embeddings": position_embeddings, "state": state}
        output, row, state = self.attend(hidden_states, layout, **given)
        return mixing.taken(output, row) * (row >= 0)[..., None], state

    def attend(
        self,
        hidden_states: Tensor,
        layout: VisionLayout | None,
        *,
        valid: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
        state: WindowState | None,
    ) -> tuple[Tensor, Tensor, WindowState | None]:
        """Eqs. (1) to (3) of those tokens that have a part in it, (..., D); `row` (B, L) int64, where each
        token stands among them, -1 = nowhere; and the state.
        """
        self.check_inputs(hidden_states, layout, valid)
        heads = hidden_states.new_empty(0, hidden_states.shape[1], 1, self.config.head_dim)  # what angles fit
        angles = checked_angles(heads, position_embeddings)
        if not self.config.text_window:
            output, row = self.attend_vision(hidden_states, fast(layout), angles)
            return output, row, None
        q, k, v = self.project_heads(hidden_states)
        q, k = rotated(q, angles, None), rotated(k, angles, None)
        mixed, state = self.attend_text(q, k, v, fast(layout), valid, state)
        if layout is not None:
            windows = (self.config.window_thw, self.layer_index)
            ids, plan = fast(layout).windows(*windows), fast(layout).window_plan(*windows)
            mixed = mixed + planned_attention(q, k, v, ids, plan)  # each is 0 where the other is not
        row = every_row(mixed) if valid is None else own_rows(valid)
        return self.o_proj(mixed.flatten(2)), row, state

    def attend_vision(
        self, hidden_states: Tensor, layout: VisionLayout, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Eqs. (1) and (2) of the tokens of `VisionLayout.vision_tokens`, (..., D), and their `row`."""
        tokens = layout.vision_tokens(self.config.window_thw, self.layer_index)
        q, k, v = self.project_heads(tokens.taken(hidden_states))
        q, k = rotated(q, angles, tokens.token), rotated(k, angles, tokens.token)
        output = planned_attention(q, k, v, tokens.window_id, tokens.plan)
        return self.o_proj(output.flatten(2)), tokens.row

    def attend_text(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: VisionLayout | None,
        valid: Tensor | None,
        state: WindowState | None,
    ) -> tuple[Tensor, WindowState]:
        """Eq. (3) before W_o, (B, L, H, P), 0 on vision; a state that was donated is overwritten by a token
        without a gradient."""
        one_token = layout is None and q.shape[1] == 1 and isinstance(state, DonatedWindowState)
        if one_token and self.config.text_window > 1 and not is_recorded(q, k, v):
            own = zip((k, v), state[:2], strict=True)
            if all(may_be_overwritten(before, new.dtype) for new, before in own):
                return step_in_place(q, k, v, state, valid=valid)
        asks = None if layout is None else ~layout.is_vision
        return sliding_window_attention(
            q, k, v, self.config.text_window, asks=asks, valid=valid, initial_state=state
        )


def is_recorded(*tensors: Tensor) -> bool:
    """Whether autograd follows what is computed of these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
