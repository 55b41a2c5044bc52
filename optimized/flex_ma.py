"""`reference/flex_ma.py` on the fast operators: same constructor, parameters, names and results.

Letters: B batch, L tokens, D width, H heads. Projections run in token order; the convolution takes the tokens
into scan order as it loads them, and the scan norms its heads and brings them back as it stores them. One
token of text takes two kernels between its hidden states and W_o: `text_step`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linmu import reference

from ..reference.flex_ma import DonatedState, FlexMAState
from ..reference.numerics import accumulation_dtype
from .causal_conv.operator import ConvInputs, causal_conv
from .decoding.operator import PooledTextStepInputs, TextStepInputs, pooled_text_step, text_step
from .engine import engine_of_block
from .engine.once import once_a_forward
from .layout import VisionLayout, begins_of, fast, permute_tokens
from .projections import checked_angles, narrow_columns, narrow_products, rotated, token_products
from .scan import ScanInputs, scan

__all__ = ["FlexMA", "FlexMAState", "PooledState"]


class PooledState(NamedTuple):
    """A state for one token of text without a gradient, among those of others: overwritten in place.

    Args:
        conv: (R, K, channels) float32, a ring, see `PooledTextStepInputs`; None where K <= 1.
        scan: (R, H, N, P) of any float dtype, each row contiguous.
        rows: (B,) int64, which of them is each one's.
        turn: (B,) int64, how many tokens each one has read.
    """

    conv: Tensor | None
    scan: Tensor
    rows: Tensor
    turn: Tensor


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
        sequence: Tensor | None = None,
    ) -> tuple[Tensor, FlexMAState]:
        """`linmu.reference.FlexMA.forward`: arguments, result and errors are the same."""
        engine = engine_of_block("FlexMA", hidden_states, self.config.head_dim)
        y, state = self.heads(hidden_states, layout, valid, position_embeddings, state, sequence, engine)
        return self.o_proj(y), state

    def heads(
        self,
        hidden_states: Tensor,
        layout: VisionLayout | None,
        valid: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
        state: FlexMAState | None,
        sequence: Tensor | None,
        engine: str | None,
        rates: Tensor | None = None,
    ) -> tuple[Tensor, FlexMAState]:
        """Eqs. (1) to (5) without W_o: (B, L, H·P), and the state after the last token.

        `rates` (B, L, 2H): dt before its softplus and the gate before its sigmoid, where the caller has them.
        """
        self.check_inputs(hidden_states, layout, valid, sequence)
        layout, angles = fast(layout), position_embeddings
        begins = begins_of("FlexMA", layout, sequence, valid)
        one_token = layout is None and state is not None and hidden_states.shape[1] == 1
        if one_token and not self.asks_for_gradient(hidden_states, state):
            return self.text_step(hidden_states, valid, angles, state, engine)
        C, B, x = self.project_heads(hidden_states)
        C, B = self.rotate(C, B, angles, engine)
        has_gate = layout is not None and self.config.reverse_scan
        if rates is None:
            linears = [self.dt_proj, self.scan_gate_proj] if has_gate else [self.dt_proj]
            rates = narrow_columns(hidden_states, linears)
        elif not has_gate:
            rates = rates[..., : self.config.heads]
        if layout is not None:
            rates = layout.in_order(rates, self.order_layer)
        rate, gate_rate = rates.tensor_split([self.config.heads], dim=-1)
        order = None if layout is None else layout.order(self.order_layer)
        (x, B, C), conv_state = self.convolve_in_order(x, B, C, valid, state, order, begins, engine)
        dt = F.softplus(rate)
        inputs = ScanInputs(
            x,
            dt,
            self.decay_rate(dt.dtype),
            B,
            C,
            gate=torch.sigmoid(gate_rate) if has_gate else None,
            segment=layout.segment if has_gate else None,
            valid=valid,
            D=self.D,
            initial_state=None if state is None else state.scan,
            order=order,
            openings=layout.openings_among(valid) if has_gate else None,
            begins=begins,
            norm_weight=self.norm_weight if self.config.head_norm else None,
            eps=self.config.norm_eps,
            engine=engine,
        )
        y, scan_state = scan(inputs)  # eq. (4) and the norm of (5)
        y = y.flatten(2)  # (B, L, H·P)
        if self.config.output_gate:
            y = y * F.silu(self.z_proj(hidden_states))
        return y, FlexMAState(conv_state, scan_state)

    def decay_rate(self, dtype: torch.dtype) -> Tensor:
        """A of eq. (3), (H,)."""
        prepared = once_a_forward(("A", id(self)), lambda: None)
        return -torch.exp(self.A_log.to(dtype)) if prepared is None else prepared

    def rotate(
        self, C: Tensor, B: Tensor, angles: tuple[Tensor, Tensor] | None, engine: str | None
    ) -> tuple[Tensor, Tensor]:
        """C and B under RoPE, where the scan has it."""
        if not self.config.scan_rope:
            return C, B
        return tuple(rotated(each, checked_angles(each, angles), engine=engine) for each in (C, B))

    def convolve_in_order(
        self,
        x: Tensor,
        B: Tensor,
        C: Tensor,
        valid: Tensor | None,
        state: FlexMAState | None,
        order: Tensor | None,
        begins: Tensor | None,
        engine: str | None,
    ) -> tuple[list[Tensor], Tensor]:
        """The scale of C and eq. (2): x, B and C in scan order, and the convolution's state."""
        scale = self.config.head_dim**-0.5
        if self.config.conv_kernel:
            start = None if state is None else state.conv
            weights = (self.conv_weight, self.conv_bias)
            return causal_conv(
                ConvInputs([x, B, C], [1.0, 1.0, scale], *weights, valid, start, order, begins, engine)
            )
        parts = [x, B, C * scale]
        if order is not None:
            parts = [permute_tokens(part, order) for part in parts]
        return parts, x.new_zeros(len(x), 0, self.config.conv_channels)

    def asks_for_gradient(self, hidden_states: Tensor, state: FlexMAState) -> bool:
        """Whether autograd would record this call."""
        if not torch.is_grad_enabled():
            return False
        read = (hidden_states, *state, *self.parameters())
        return any(tensor.requires_grad for tensor in read if tensor is not None)

    def text_step(
        self,
        hidden_states: Tensor,
        valid: Tensor | None,
        angles: tuple[Tensor, Tensor] | None,
        state: FlexMAState | PooledState,
        engine: str | None,
        products: tuple[Tensor, Tensor] | None = None,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, FlexMAState]:
        """Eqs. (1) to (5) without W_o, one token of text without a gradient: (B, 1, H·P), and the state.

        A donated or pooled state is overwritten; any other is left as it was. `products`: [x, B, C] (B,
        channels) and dt before its softplus (B, H), where the caller has them. `into`, for a pooled state:
        `PooledTextStepInputs`'s logit and out, if it is to be scaled and to stand there.
        """
        x, B, C, rate, z = self.project_token(hidden_states, angles, engine, products)
        has_taps, has_norm = self.config.conv_kernel > 0, self.config.head_norm
        rest = (
            x,
            B,
            C,
            rate,
            self.A_log,
            self.D,
            self.conv_weight if has_taps else None,
            self.conv_bias if has_taps else None,
            self.norm_weight if has_norm else None,
            z,
            None if valid is None else valid[:, 0],
            self.config.head_dim**-0.5,
            self.config.norm_eps,
            engine,
        )
        if isinstance(state, PooledState):
            inputs = PooledTextStepInputs(state.scan, state.conv, state.rows, state.turn, *rest)
            if into is None:
                y = pooled_text_step(inputs)
            else:
                logit, y = into
                pooled_text_step(inputs._replace(logit=logit, out=y))
            return y[:, None], FlexMAState(state.conv, state.scan)
        scan_state = state.scan
        if not (isinstance(state, DonatedState) and may_be_overwritten(scan_state, rate.dtype)):
            scan_state = scan_state.to(rate.dtype, copy=True, memory_format=torch.contiguous_format)
        y, conv_state = text_step(TextStepInputs(scan_state, state.conv if has_taps else None, *rest))
        return y[:, None], FlexMAState(conv_state, scan_state)

    def project_token(
        self,
        u: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        engine: str | None,
        products: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """x (B, G, P), B (B, G, N), C (B, H, N) before its scale, dt before its softplus (B, H), z (B, H·P).

        The gate is left out: text has one direction. All weights are read in one launch where they are plain
        tensors; their modules are called where they are not, and in large batches, which GEMMs suit better.
        """
        config, gate = self.config, self.z_proj if self.config.output_gate else None
        linears = [self.v_proj, self.k_proj, self.q_proj]
        if products is None:
            products = token_products(u, linears, [self.dt_proj], gate, engine)
        elif gate is not None:
            products = (*products, gate(u)[:, 0])
        if products is not None:
            xBC, rate, *z = products
            z = z[0] if z else None
            x, B, C = self.split(xBC[:, None])
            if config.qk_norm:
                C, B = self.q_norm(C), self.k_norm(B)
        else:
            C, B, x = self.project_heads(u)
            rate = narrow_products(u, [self.dt_proj])[0][:, 0]
            z = None if gate is None else gate(u)[:, 0]
        C, B = self.rotate(C, B, angles, engine)
        return x[:, 0], B[:, 0], C[:, 0], rate, None if gate is None else z


def prepare_decay_rates(branches: list[FlexMA], u: Tensor) -> None:
    """Make A of all layers at once, for hidden states like u (B, L, D): two small kernels a layer otherwise.
    It holds within `one_forward`, and for calls without gradients.
    """
    if branches and u.shape[1] > 1:  # one token takes `text_step`
        logs = torch.stack([branch.A_log for branch in branches]).to(accumulation_dtype(u.dtype))
        for branch, rate in zip(branches, -torch.exp(logs), strict=True):
            once_a_forward(("A", id(branch)), lambda rate=rate: rate)


def may_be_overwritten(state: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel may write a new state over this one: its layout fits and autograd has no use for it.

    A tensor made in inference mode may not be changed outside, and a compiler's trace cannot tell one.
    """
    if torch.compiler.is_compiling() or state.dtype != dtype or not state.is_contiguous():
        return False
    return not state.requires_grad and (torch.is_inference_mode_enabled() or not state.is_inference())
