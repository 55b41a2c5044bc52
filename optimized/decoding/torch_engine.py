"""One token of text through Flex-MA, from its projections to the output projection; the torch engine.

Letters: B batch, D width, H heads, G groups, N = P head dim, K conv taps. Eqs. (1) to (5) of
`reference/flex_ma.py` for L = 1, but for its matrix products and the q/k norms and rope that follow them.
`project` is those products of one token, in the order that the convolution's channels have.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference.numerics import rms_norm_per_head
from ..causal_conv import torch_engine as conv
from ..precision import accumulation_dtype, without_autocast
from . import torch_step as step


@without_autocast
def project(
    u: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    dt_weight: Tensor,
    dt_bias: Tensor,
    z_weight: Tensor | None,
    z_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every product with the hidden states of one token.

    Args:
        u: (B, D).
        weights: of v, k and q: (G·P, D), (G·N, D), (H·N, D), in the dtype of `u`.
        biases: theirs; None = none.
        dt_weight, dt_bias: (H, D), (H,), of any float dtype.
        z_weight, z_bias: (H·P, D), (H·P,) in the dtype of `u`; None = no output gate.
    Returns:
        [x, B, C] (B, channels); W_dt u + b_dt (B, H) in the accumulation dtype; z (B, H·P), or nothing.
    """
    pairs = zip(weights, biases, strict=True)
    taken = torch.cat([F.linear(u, weight, bias) for weight, bias in pairs], dim=1)
    wide = u.to(accumulation_dtype(u.dtype))
    rate = F.linear(wide, dt_weight.to(wide.dtype), dt_bias.to(wide.dtype))
    return taken, rate, u.new_empty(0) if z_weight is None else F.linear(u, z_weight, z_bias)


@without_autocast
def advance(
    scan_state: Tensor,
    conv_state: Tensor | None,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    rate: Tensor,
    A_log: Tensor,
    D: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    norm_weight: Tensor | None,
    z: Tensor | None,
    valid: Tensor | None,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Scale of C, convolution, dt and A, one step of the scan, norm and output gate.

    Args:
        scan_state: (B, H, N, P) in the accumulation dtype, contiguous: overwritten with the new state.
        conv_state: (B, K-1, channels); None = no convolution.
        x, B, C: (B, G, P), (B, G, N), (B, H, N), before `scale` and convolution.
        rate: (B, H), dt before its softplus.
        A_log, D: (H,).
        conv_weight, conv_bias: (channels, K), (channels,); None = no convolution.
        norm_weight: (H·P,); None = no norm.
        z: (B, H·P), before its silu; None = no output gate.
        valid: (B,) bool; other rows keep their states and give 0. None = all.
        scale: of C.
        eps: of the norm.
    Returns:
        (B, H·P) in the dtype of `x`, and the convolution's new state, (B, K-1, channels).
    """
    batch, dtype = len(x), x.dtype
    wide = scan_state.dtype
    taken = torch.cat([x.flatten(1), B.flatten(1), (C * scale).flatten(1)], dim=1)[:, None]
    sizes = (x[0].numel(), B[0].numel(), C[0].numel())
    if conv_weight is None:
        new_conv_state = taken.new_zeros(batch, 0, taken.shape[2])
    else:
        mask = None if valid is None else valid[:, None]
        taken, new_conv_state = conv.forward(taken, conv_weight, conv_bias, mask, conv_state, None, 1.0)
    parts = zip(taken[:, 0].split(sizes, dim=1), (x, B, C), strict=True)
    x, B, C = (part.view(like.shape) for part, like in parts)
    dt, A = F.softplus(rate.to(wide)), -torch.exp(A_log.to(wide))
    y, new_scan_state = step.advance(scan_state, x, dt, A, B, C, D, valid)
    scan_state.copy_(new_scan_state)
    if norm_weight is not None:
        y = rms_norm_per_head(y[:, None], norm_weight, eps)[:, 0]
    y = y.to(dtype).flatten(1)
    return y if z is None else y * F.silu(z), new_conv_state
