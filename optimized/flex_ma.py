"""`reference/flex_ma.py` on the fast operators: same constructor, parameters, names and results.

Letters: B batch, L tokens, D width, H heads. Projections run in token order; the convolution takes the tokens
into scan order as it loads them, and the scan norms its heads and brings them back as it stores them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference.flex_ma import FlexMAState, full_precision_linear, rms_norm_per_head
from . import operators
from .layout import VisionLayout, fast, permute_tokens
from .scan import causal_conv, scan_heads, scan_step

__all__ = ["FlexMA", "FlexMAState", "full_precision_linear", "rms_norm_per_head"]


class FlexMA(reference.FlexMA):
    """The global branch of M-MATE: `linmu.reference.FlexMA`, the same state dict."""

    def forward(
        self,
        hidden_states: Tensor,
        layout: VisionLayout | None = None,
        *,
        valid: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        state: FlexMAState | None = None,
    ) -> tuple[Tensor, FlexMAState]:
        """`linmu.reference.FlexMA.forward`: arguments, result and errors are the same."""
        y, state = self.heads(
            hidden_states, layout, valid=valid, position_embeddings=position_embeddings, state=state
        )
        return self.o_proj(y), state

    def heads(
        self,
        hidden_states: Tensor,
        layout: VisionLayout | None,
        *,
        valid: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
        state: FlexMAState | None,
    ) -> tuple[Tensor, FlexMAState]:
        """Eqs. (1) to (5) but for W_o: (B, L, H·P), and the state after the last token."""
        self.check_inputs(hidden_states, layout, valid)
        layout = fast(layout)
        taken, dt, gate = self.project(hidden_states, position_embeddings)
        if layout is None and state is not None and taken.shape[1] == 1:
            y, state = self.step(taken, dt, valid, state)
        else:
            y, state = self.mix(taken, dt, gate, layout, valid, state)
        y = y.flatten(2)  # (B, L, H·P)
        if self.config.output_gate:
            y = y * F.silu(self.z_proj(hidden_states))
        return y, state

    def mix(
        self,
        taken: Tensor,
        dt: Tensor,
        gate: Tensor,
        layout: VisionLayout | None,
        valid: Tensor | None,
        state: FlexMAState | None,
    ) -> tuple[Tensor, FlexMAState]:
        """Eqs. (2), (4) and the norm of (5): normed heads (B, L, H, P) in token order, and the state."""
        order = None if layout is None else layout.order(self.scan_axes)
        if order is not None:
            dt, gate = permute_tokens(dt, order), permute_tokens(gate, order)
        taken, conv_state = self.convolve_in_order(taken, valid, state, order)
        x, B, C = self.split(taken)
        y, scan_state = scan_heads(
            x,
            dt,
            -torch.exp(self.A_log.to(dt.dtype)),
            B,
            C,
            gate=gate,
            segment=layout.segment if layout is not None and self.config.backward_scan else None,
            valid=valid,
            D=self.D,
            initial_state=None if state is None else state.scan,
            order=order,
            norm_weight=self.norm_weight if self.config.head_norm else None,
            eps=self.config.norm_eps,
        )
        return y, FlexMAState(conv_state, scan_state)

    def convolve_in_order(
        self, taken: Tensor, valid: Tensor | None, state: FlexMAState | None, order: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Eq. (2): [x, B, C] in token order -> the same in scan order, and the convolution's state."""
        if not self.config.conv_kernel:
            return super().convolve(taken if order is None else permute_tokens(taken, order), valid, state)
        start = None if state is None else state.conv
        if order is None:
            return causal_conv(taken, self.conv_weight, self.conv_bias, mask=valid, initial_state=start)
        return operators.causal_conv(taken, self.conv_weight, self.conv_bias, valid, start, order)

    def step(
        self, taken: Tensor, dt: Tensor, valid: Tensor | None, state: FlexMAState
    ) -> tuple[Tensor, FlexMAState]:
        """Eqs. (2), (4) and the norm of (5) for one token of text: (B, 1, H, P), and the state."""
        taken, conv_state = self.convolve_in_order(taken, valid, state, None)
        x, B, C = (tensor[:, 0] for tensor in self.split(taken))
        A, row = -torch.exp(self.A_log.to(dt.dtype)), None if valid is None else valid[:, 0]
        y, scan_state = scan_step(state.scan, x, dt[:, 0], A, B, C, D=self.D, valid=row)
        y = y[:, None]
        if self.config.head_norm:
            y = rms_norm_per_head(y, self.norm_weight, self.config.norm_eps)
        return y, FlexMAState(conv_state, scan_state)
