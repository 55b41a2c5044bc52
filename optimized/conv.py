"""The causal convolution as K shifted products, over the valid tokens of a row moved together.

Letters: B batch, L tokens, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import accumulation_dtype


def convolve(
    u: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All tokens valid: out (B, L, channels) in the dtype of `u`, and the last K-1 inputs."""
    padded = with_start(u, weight, initial_state)
    length = u.shape[1]
    return shifted_products(padded, weight, bias, length).to(u.dtype), padded[:, length:].clone()


def convolve_valid(
    u: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Move valid tokens to the front, convolve, move the results back; 0 where the mask is False."""
    length, taps = u.shape[1], weight.shape[1]
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)  # (B, L): valid tokens first
    seen = mask.gather(1, order)[..., None]
    packed = torch.where(seen, take(u, order), 0)
    padded = with_start(packed, weight, initial_state)
    out = shifted_products(padded, weight, bias, length).to(u.dtype)
    out = torch.where(mask[..., None], take(out, order.argsort(dim=1)), 0)
    last = mask.sum(1, keepdim=True) + torch.arange(taps - 1, device=u.device)  # (B, K-1)
    return out, take(padded, last)


def with_start(u: Tensor, weight: Tensor, initial_state: Tensor | None) -> Tensor:
    """The K-1 inputs before the first in front, in the accumulation dtype: (B, K-1+L, channels)."""
    accumulate = accumulation_dtype(u.dtype)
    if initial_state is None:
        initial_state = u.new_zeros(u.shape[0], weight.shape[1] - 1, u.shape[2])
    return torch.cat([initial_state.to(accumulate), u.to(accumulate)], dim=1)


def shifted_products(padded: Tensor, weight: Tensor, bias: Tensor | None, length: int) -> Tensor:
    """Σ_k weight[k] · padded[t + k] + bias, (B, L, channels)."""
    weight = weight.to(padded.dtype)
    out = padded[:, :length] * weight[:, 0]
    for tap in range(1, weight.shape[1]):
        out = torch.addcmul(out, padded[:, tap : tap + length], weight[:, tap])
    return out if bias is None else out + bias.to(padded.dtype)


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """tensor (B, L, channels), index (B, M) -> (B, M, channels): rows of the same batch entry."""
    start = torch.arange(tensor.shape[0], device=tensor.device)[:, None] * tensor.shape[1]
    rows = tensor.flatten(0, 1).index_select(0, (index + start).flatten())
    return rows.view(*index.shape, tensor.shape[2])
