"""`reference/flex_ma.py` on the fast operators: same constructor, parameters, names and results.

Letters: B batch, L tokens, D width, H heads. Tokens take their places in the scan before the projections, so
that one gather of (B, L, D) stands for those of x, B, C, dt and the gate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..reference.flex_ma import FlexMAState, full_precision_linear, rms_norm_per_head
from .layout import VisionLayout, fast, permute_tokens
from .scan import bidirectional_scan, causal_conv, scan_step

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
        self.check_inputs(hidden_states, layout, valid)
        layout = fast(layout)
        scanned, angles = hidden_states, position_embeddings
        if layout is not None:
            order = layout.order(self.scan_axes)
            scanned = permute_tokens(hidden_states, order)
            if self.config.scan_rope and angles is not None:
                angles = tuple(permute_tokens(angle.expand(len(order), -1, -1), order) for angle in angles)
        taken, dt, gate = self.project(scanned, angles)
        taken, conv_state = self.convolve(taken, valid, state)
        y, scan_state = self.scan(taken, dt, gate, layout, valid, state)
        if layout is not None:
            y = permute_tokens(y, layout.inverse(self.scan_axes))
        return self.project_out(y, hidden_states), FlexMAState(conv_state, scan_state)

    def convolve(
        self, taken: Tensor, valid: Tensor | None, state: FlexMAState | None
    ) -> tuple[Tensor, Tensor]:
        """Eq. (2): (B, L, channels) -> the same, and the convolution's state (B, K-1, channels)."""
        if not self.config.conv_kernel:
            return super().convolve(taken, valid, state)
        start = None if state is None else state.conv
        return causal_conv(taken, self.conv_weight, self.conv_bias, mask=valid, initial_state=start)

    def scan(
        self,
        taken: Tensor,
        dt: Tensor,
        gate: Tensor,
        layout: VisionLayout | None,
        valid: Tensor | None,
        state: FlexMAState | None,
    ) -> tuple[Tensor, Tensor]:
        """Eq. (4) in scan order: (B, L, H, P) and the state (B, H, N, P)."""
        x, B, C = self.split(taken)
        A = -torch.exp(self.A_log.to(dt.dtype))
        start = None if state is None else state.scan
        if layout is None and start is not None and taken.shape[1] == 1:
            row = None if valid is None else valid[:, 0]
            y, end = scan_step(start, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D=self.D, valid=row)
            return y[:, None], end
        segment = layout.segment if layout is not None and self.config.backward_scan else None
        return bidirectional_scan(
            x, dt, A, B, C, gate=gate, segment=segment, valid=valid, D=self.D, initial_state=start
        )
