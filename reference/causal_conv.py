"""The short causal convolution in front of the scan (Mamba2, arXiv 2405.21060).

Letters: B batch, L tokens, K taps.

    out_t = Σ_k weight[k] · u_{t-K+1+k} + bias        k = 0 ... K-1, over valid tokens only               (1)

Choice: padding is skipped as if absent; the alternative, zeros in its place, would make a padded row differ
from the same row alone. Choice: no activation afterwards; Mamba2's SiLU would change what attention's weights
compute. Several samples may share a row: where one begins, only zeros are before it.
Cost: a loop over tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import require, require_float, require_int64, require_mask, require_one_device, require_shape
from .numerics import accumulation_dtype, begins_sample, without_autocast, zero_where_masked


@without_autocast
def causal_conv(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    sequence: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution over valid tokens; eq. (1) (Mamba2, arXiv 2405.21060).

    Args:
        u: (B, L, channels) input, any float dtype.
        weight: (channels, K); the last tap meets the current token.
        bias: (channels,) or None.
        mask: (B, L) bool, None = all True; False = skipped as if absent: out = 0, no gradient.
        initial_state: (B, K-1, channels), the K-1 inputs before the first, oldest first; zeros if None.
        sequence: (B, L) int64, which sample of a packed row a token belongs to; the tokens of one follow each
            other, and nothing crosses from one to the next. The ids of masked tokens say nothing. None = one
            a row.
            Choice: the state before belongs to the row's first sample, the state after is that of the last.
    Returns:
        out: (B, L, channels) in the dtype of `u`.
        final_state: (B, K-1, channels), the last K-1 valid inputs, of the last sample, in float32, or float64
            if `u` is.
    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, K = 0 or L = 0.
    """
    check_conv("causal_conv", u, weight, bias, mask, initial_state, sequence)
    dtype, accumulate = u.dtype, accumulation_dtype(u.dtype)
    batch, channels, taps = u.shape[0], *weight.shape
    u, weight = u.to(accumulate), weight.to(accumulate)
    if mask is not None:
        u = zero_where_masked(u, mask[..., None])
    start = u.new_zeros(batch, taps - 1, channels) if initial_state is None else initial_state
    window = start.to(accumulate)  # (B, K-1, channels)
    begins = None if sequence is None else begins_sample(sequence, mask)
    outputs: list[Tensor] = []
    for t, u_t in enumerate(u.unbind(1)):
        if begins is not None:
            window = zero_where_masked(window, ~begins[:, t, None, None])
        seen = torch.cat([window, u_t[:, None]], dim=1)  # (B, K, channels)
        out_t = (seen * weight.T).sum(1)  # eq. (1)
        out_t = out_t if bias is None else out_t + bias.to(accumulate)
        outputs.append(out_t if mask is None else zero_where_masked(out_t, mask[:, t, None]))
        window = seen[:, 1:] if mask is None else torch.where(mask[:, t, None, None], seen[:, 1:], window)
    return torch.stack(outputs, dim=1).to(dtype), window


def check_conv(where: str, u, weight, bias, mask, initial_state, sequence=None) -> None:
    """Shapes, dtypes and devices of the convolution's arguments."""
    require_float(where, u=u, weight=weight, bias=bias, initial_state=initial_state)
    require_shape(where, "u", u, (None, None, None), "B, L, channels")
    batch, length, channels = u.shape
    require(length >= 1, where, "L must be at least 1", length)
    require_shape(where, "weight", weight, (channels, None), "channels, K")
    taps = weight.shape[1]
    require(taps >= 1, where, "weight must have at least one tap", taps)
    if bias is not None:
        require_shape(where, "bias", bias, (channels,), "channels")
    require_mask(where, "mask", mask, (batch, length), "B, L")
    require_int64(where, "sequence", sequence, (batch, length), "B, L")
    require_one_device(where, u=u, mask=mask, sequence=sequence)
    if initial_state is not None:
        require_shape(where, "initial_state", initial_state, (batch, taps - 1, channels), "B, K-1, channels")
