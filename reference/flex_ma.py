"""Flex-MA: the global branch, a masked bidirectional Mamba2 that starts from the attention it replaces.

Letters: B batch, L tokens, D width, H heads, G groups, N state size = P head dim, K conv taps. Input u (B, L,
D): the layer's normed hidden states.

    C = N^-½ · W_q u      B = W_k u      x = W_v u              with the teacher's biases and q/k norms   (1)
    [x, B, C] = causal_conv([x, B, C] in scan order)                                                      (2)
    dt = softplus(W_dt u + b_dt)    A = -exp(A_log)    gate = sigmoid(W_g u + b_g)      in float32        (3)
    y = bidirectional_scan(x, dt, A, B, C, gate) back in token order                                      (4)
    y = W_o (w · y / rms(y)), the root mean square per head                                               (5)

LinMU, arXiv 2601.01322: both branches start from the attention weights, C from q, B from k, x from v. How the
parameters start that attention does not have: `FlexMA.initial_values`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .causal_conv import causal_conv
from .checks import require
from .config import LinMUConfig
from .layout import VisionLayout, permute_tokens, samples_of
from .numerics import full_precision_linear, rms_norm_per_head
from .projections import HeadProjections, apply_rope, split_heads
from .scan import bidirectional_scan, scan_step


class FlexMAState(NamedTuple):
    """What decoding keeps of one layer, constant in size, float32 (float64 for a float64 model).

    Args:
        conv: (B, K-1, channels), the last valid inputs of the convolution in scan order, oldest first.
        scan: (B, H, N, P), the state of the left-to-right scan.
    """

    conv: Tensor
    scan: Tensor


class DonatedState(FlexMAState):
    """A state the callee may overwrite in place; the caller must use the returned state."""

    __slots__ = ()


class FlexMA(HeadProjections):
    """The global branch of M-MATE (LinMU, arXiv 2601.01322), eqs. (1) to (5).

    Args:
        config: sizes and options.
        layer_index: index of the decoder layer, >= 0; it chooses the scan order.
    Raises:
        ValueError: for a negative index.
    """

    def __init__(self, config: LinMUConfig, layer_index: int) -> None:
        super().__init__(config, layer_index)
        heads, inner = config.heads, config.heads * config.head_dim
        self.dt_proj = nn.Linear(config.width, heads)
        if not config.text_only:
            self.scan_gate_proj = nn.Linear(config.width, heads)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        if config.conv_kernel:
            self.conv_weight = nn.Parameter(torch.empty(config.conv_channels, config.conv_kernel))
            self.conv_bias = nn.Parameter(torch.empty(config.conv_channels))
        if config.head_norm:
            self.norm_weight = nn.Parameter(torch.empty(inner))
        if config.output_gate:
            self.z_proj = nn.Linear(config.width, inner)
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        """As `InitialValues`.

        Choice: neutral, so that the attention's weights decide: dt = 1, gate = ½, D = 0, norm weight 1, the
        identity as convolution, half-lives log-spaced over the heads, and silu(z) = 1. The alternative,
        Mamba2's own random start, forgets within 0.4 to 700 tokens and loses what the weights have learnt.
        """
        config = self.config
        inverse_softplus_of_one = math.log(math.expm1(1.0))
        half_life = torch.logspace(*(math.log10(tokens) for tokens in config.half_life), config.heads)
        values = {
            "dt_proj.weight": torch.zeros(config.heads, config.width),
            "dt_proj.bias": torch.full((config.heads,), inverse_softplus_of_one),
            "A_log": torch.log(math.log(2) / half_life),
            "D": torch.zeros(config.heads),
        }
        if not config.text_only:
            values["scan_gate_proj.weight"] = torch.zeros(config.heads, config.width)
            values["scan_gate_proj.bias"] = torch.zeros(config.heads)
        if config.conv_kernel:
            identity = F.pad(torch.ones(config.conv_channels, 1), (config.conv_kernel - 1, 0))
            values |= {"conv_weight": identity, "conv_bias": torch.zeros(config.conv_channels)}
        if config.head_norm:
            values["norm_weight"] = torch.ones(config.heads * config.head_dim)
        if config.output_gate:
            inner = config.heads * config.head_dim
            silu_is_one = 1.2784645427610738  # z · sigmoid(z) = 1
            values |= {
                "z_proj.weight": torch.zeros(inner, config.width),
                "z_proj.bias": torch.full((inner,), silu_is_one),
            }
        return values

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
        """Mix all tokens of the sequence; eqs. (1) to (5).

        Args:
            hidden_states: u, (B, L, D), any float dtype.
            layout: where the vision tokens of these L positions are; None = all text.
            valid: (B, L) bool, True = not padding; None = all valid.
            position_embeddings: the teacher's (cos, sin), each (B or 1, L, N); read with `scan_rope` only.
            state: the state after the tokens before; None = there were none.
            sequence: (B, L) int64, which sample of a packed row of text a token belongs to, as operators take
                it; of a row with a layout, the layout says it. None = one a row, or as the layout says.
        Returns:
            (B, L, D) in the dtype of `hidden_states`, and the state after the last token.
        Raises:
            ValueError: for shapes or dtypes that do not fit.
        """
        self.check_inputs(hidden_states, layout, valid, sequence)
        sequence = samples_of("FlexMA", layout, sequence)
        xBC, dt, gate = self.project(hidden_states, position_embeddings)
        order = None if layout is None else layout.order(self.order_layer)
        if order is not None:
            xBC, dt, gate = (permute_tokens(tensor, order) for tensor in (xBC, dt, gate))
        xBC, conv_state = self.convolve(xBC, valid, state, sequence)
        y, scan_state = self.scan(xBC, dt, gate, layout, valid, state, sequence)
        if order is not None:
            y = permute_tokens(y, layout.inverse(self.order_layer))
        return self.project_out(y, hidden_states), FlexMAState(conv_state, scan_state)

    @property
    def order_layer(self) -> int:
        """The layer index whose scan order this layer uses: its own, or 0 with `rotary_major` off."""
        return self.layer_index if self.config.rotary_major else 0

    def project(self, u: Tensor, position_embeddings) -> tuple[Tensor, Tensor, Tensor]:
        """Eqs. (1) and (3): [x, B, C] as (B, L, channels); dt and gate, (B, L, H), at least float32."""
        C, B, x = self.project_heads(u)  # eq. (1)
        if self.config.scan_rope:
            C, B = apply_rope(C, position_embeddings), apply_rope(B, position_embeddings)
        C = C * self.config.head_dim**-0.5
        xBC = torch.cat([tensor.flatten(2) for tensor in (x, B, C)], dim=-1)  # (B, L, G·P + G·N + H·N)
        dt = F.softplus(full_precision_linear(u, self.dt_proj))  # eq. (3)
        if self.config.text_only:
            return xBC, dt, torch.full_like(dt, 0.5)  # text does not read its gate
        gate = torch.sigmoid(full_precision_linear(u, self.scan_gate_proj))  # eq. (3)
        return xBC, dt, gate

    def convolve(
        self, xBC: Tensor, valid: Tensor | None, state: FlexMAState | None, sequence: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Eq. (2): (B, L, channels) -> the same, and the convolution's state (B, K-1, channels)."""
        if not self.config.conv_kernel:
            return xBC, xBC.new_zeros(xBC.shape[0], 0, xBC.shape[2])
        start = None if state is None else state.conv
        given = {"mask": valid, "initial_state": start, "sequence": sequence}
        return causal_conv(xBC, self.conv_weight, self.conv_bias, **given)  # eq. (2)

    def scan(
        self,
        xBC: Tensor,
        dt: Tensor,
        gate: Tensor,
        layout: VisionLayout | None,
        valid: Tensor | None,
        state: FlexMAState | None,
        sequence: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Eq. (4) in scan order: (B, L, H, P) and the state (B, H, N, P)."""
        x, B, C = self.split(xBC)
        A = -torch.exp(self.A_log.to(dt.dtype))  # eq. (3)
        start = None if state is None else state.scan
        if layout is None and start is not None and xBC.shape[1] == 1:
            valid_row = None if valid is None else valid[:, 0]
            y, end = scan_step(start, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D=self.D, valid=valid_row)
            return y[:, None], end
        segment = layout.segment if layout is not None and self.config.reverse_scan else None
        given = {"segment": segment, "valid": valid, "initial_state": start, "sequence": sequence}
        return bidirectional_scan(x, dt, A, B, C, gate=gate, D=self.D, **given)

    def split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, channels) -> x (B, L, G, P), B (B, L, G, N), C (B, L, H, N)."""
        heads, groups, dim = self.config.heads, self.config.groups, self.config.head_dim
        x, B, C = xBC.split((groups * dim, groups * dim, heads * dim), dim=-1)
        return split_heads(x, groups), split_heads(B, groups), split_heads(C, heads)

    def project_out(self, y: Tensor, u: Tensor) -> Tensor:
        """Eq. (5): y (B, L, H, P) in token order -> (B, L, D)."""
        if self.config.head_norm:
            y = rms_norm_per_head(y, self.norm_weight, self.config.norm_eps)
        y = y.flatten(2)  # (B, L, H·P)
        if self.config.output_gate:
            y = y * F.silu(self.z_proj(u))
        return self.o_proj(y)  # eq. (5)

    def check_inputs(
        self,
        hidden_states: Tensor,
        layout: VisionLayout | None,
        valid: Tensor | None,
        sequence: Tensor | None,
    ) -> None:
        """Check shapes here, so that errors name FlexMA's own arguments."""
        batch, length = self.check_tokens("FlexMA", hidden_states, valid, sequence)
        must = "layout must be None, as the block has no parameters for vision"
        hint = "make it with text_only off, convert(teacher, {'text_only': False})"
        require(layout is None or not self.config.text_only, "FlexMA", must, "a layout", hint)
        if layout is not None:
            same = tuple(layout.coords.shape[:2]) == (batch, length)
            got = f"{tuple(layout.coords.shape[:2])} for {(batch, length)}"
            require(same, "FlexMA", "layout must describe the same (B, L) as hidden_states", got)
