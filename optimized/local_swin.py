"""`reference/local_swin.py` on the fast attentions: same constructor, parameters, names and results.

Letters: B batch, L tokens, D width, n tokens of vision. Without a text window, text has no part in it: its
tokens are left out before the projections.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linmu import reference

from ..reference.layout import samples_of
from ..reference.sliding_window_attention import DonatedWindowState, WindowState
from .elementwise.torch_engine import local_rows
from .engine import engine_of_block
from .engine.once import once_a_forward
from .flex_ma import may_be_overwritten
from .layout import VisionLayout, fast, rows_where
from .projections import checked_angles, rotated, token_products
from .sliding_window_attention import (
    PooledWindowState,
    attend_spans,
    is_step,
    sliding_window_attention,
    spans_of_layer,
    step_in_place,
    step_in_ring,
)
from .window_attention import planned_attention

__all__ = ["LocalSwin"]

Angles = tuple[Tensor, Tensor] | None


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
        sequence: Tensor | None = None,
    ) -> tuple[Tensor, WindowState | None]:
        """`linmu.reference.LocalSwin.forward`: arguments, results and errors are the same."""
        engine = engine_of_block("LocalSwin", hidden_states, self.config.head_dim)
        given = (valid, position_embeddings, state, sequence, engine)
        heads, row, state = self.attend(hidden_states, layout, *given)
        return local_rows(self.o_proj(heads), row) * (row >= 0)[..., None], state

    def attend(
        self,
        hidden_states: Tensor,
        layout: VisionLayout | None,
        valid: Tensor | None,
        position_embeddings: Angles,
        state: WindowState | None,
        sequence: Tensor | None,
        engine: str | None,
        vkq: Tensor | None = None,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, WindowState | None]:
        """Eqs. (1) to (3) without W_o, of those tokens that have a part in it, (..., H·P); `row`, where each
        token stands among them, (B, L) int64, -1 = nowhere; and the state.

        `vkq` is what `project_token` gives, where the caller has it; `into`, for a pooled state, as in
        `step_in_ring`.
        """
        self.check_inputs(hidden_states, layout, valid, sequence)
        layout = fast(layout)
        sequence = samples_of("LocalSwin", layout, sequence)
        heads = hidden_states.new_empty(0, hidden_states.shape[1], 1, self.config.head_dim)  # what angles fit
        angles = checked_angles(heads, position_embeddings)
        if not self.config.text_window:
            tokens = layout.vision_tokens(self.config.window_thw, self.layer_index)
            q, k, v = self.project_heads(tokens.gather(hidden_states))
            q, k = (rotated(each, angles, tokens.token, engine) for each in (q, k))
            output = planned_attention(q, k, v, tokens.window_id, tokens.plan, engine=engine)
            return output.flatten(2), tokens.row, None
        groups, is_pooled = self.config.groups, isinstance(state, PooledWindowState)
        if vkq is None:
            q, k, v = self.project_heads(hidden_states)
        else:
            heads = vkq.unflatten(1, (-1, self.config.head_dim))[:, None]  # (B, 1, G + G + H, N)
            v, k, q = heads.tensor_split([groups, 2 * groups], dim=2)
        if is_pooled:
            output = step_in_ring(q, k, v, angles, state, valid=valid, engine=engine, into=into)
        else:
            if vkq is None:
                q, k = (rotated(each, angles, engine=engine) for each in (q, k))
            else:  # they stand side by side
                kq = rotated(heads[:, :, groups:], angles, engine=engine)
                k, q = kq.tensor_split([groups], dim=2)
            output, state = self.attend_text(q, k, v, layout, valid, state, sequence, engine)
        if layout is not None:
            windows = (self.config.window_thw, self.layer_index)
            ids, plan = layout.windows(*windows), layout.window_plan(*windows)
            of_vision = planned_attention(q, k, v, ids, plan, engine=engine)
            output = output + of_vision  # each is 0 where the other is not
        row = once_a_forward("rows", lambda: rows_where(valid, output))
        return output.flatten(2), row, state

    def project_token(
        self, u: Tensor, narrow: nn.Module, state: WindowState | None, engine: str | None
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """v, k and q of one token of text after others in one launch, (B, channels), and with them `narrow`'s
        product (B, 1, n) in the accumulation dtype; None where this does not pay or must not be.
        """
        if u.shape[1] != 1 or state is None or not self.config.text_window or self.config.qk_norm:
            return None, None
        if torch.is_grad_enabled():
            read = (u, *self.parameters(), *narrow.parameters())
            if any(tensor.requires_grad for tensor in read):
                return None, None
        products = token_products(u, [self.v_proj, self.k_proj, self.q_proj], [narrow], None, engine)
        if products is None:
            return None, None
        vkq, product, _ = products
        return vkq, product[:, None]

    def attend_text(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: VisionLayout | None,
        valid: Tensor | None,
        state: WindowState | None,
        sequence: Tensor | None,
        engine: str | None,
    ) -> tuple[Tensor, WindowState]:
        """Eq. (3) before W_o, (B, L, H, P), 0 on vision; and the state, overwritten if it was donated and one
        token without a gradient comes.
        """
        window = self.config.text_window
        if layout is None and is_step(q, k, v, window, state):
            pairs = zip(state[:2], (k, v), strict=True)
            donated = isinstance(state, DonatedWindowState) and all(
                may_be_overwritten(s, t.dtype) for s, t in pairs
            )
            if donated:
                return step_in_place(q, k, v, state, valid=valid, engine=engine)
            return sliding_window_attention(q, k, v, window, valid=valid, initial_state=state)
        is_vision = None if layout is None else layout.is_vision
        present = None if state is None else state.present
        spans = spans_of_layer(window, q.shape[1], is_vision, valid, sequence, present)
        return attend_spans(q, k, v, window, spans, initial_state=state, engine=engine)
