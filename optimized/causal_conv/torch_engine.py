"""The torch engine of the causal convolution: K shifted products, over the valid tokens of a row moved
together.

Letters: B batch, L tokens, K taps. With s the state and then the valid inputs of a row times the scale:

    out_t = Σ_k weight[k] s_{t+k} + bias     s̄_t = Σ_k weight[k] out̄_{t-k}     weight̄[k] = Σ_t out̄_t s_{t+k}
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..precision import accumulation_dtype, without_autocast


@dataclass(frozen=True)
class Packing:
    """Where the valid tokens of each row go: to its front, in their order; None = all are valid."""

    mask: Tensor | None  # (B, L) bool
    order: Tensor | None  # (B, L): the token that stands at each place, valid ones first
    counts: Tensor | None  # (B, 1): valid tokens

    @classmethod
    def of(cls, mask: Tensor | None) -> Packing:
        if mask is None:
            return cls(None, None, None)
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
        return cls(mask, order, mask.sum(1, keepdim=True))

    def pack(self, tensor: Tensor) -> Tensor:
        """(B, L, channels): valid tokens first, zeros after them."""
        if self.mask is None:
            return tensor
        return torch.where(self.mask.gather(1, self.order)[..., None], take(tensor, self.order), 0)

    def unpack(self, tensor: Tensor) -> Tensor:
        """The inverse of `pack`, 0 where the mask is False."""
        if self.mask is None:
            return tensor
        return torch.where(self.mask[..., None], take(tensor, self.order.argsort(dim=1)), 0)

    def last(self, padded: Tensor, states: int) -> Tensor:
        """(B, K-1): where the last K-1 inputs stand in the state followed by the packed tokens."""
        place = torch.arange(states, device=padded.device)
        start = padded.shape[1] - states if self.counts is None else self.counts
        return (start + place).expand(padded.shape[0], states)


@without_autocast
def forward(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    initial_state: Tensor | None,
    order: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out (B, L, channels) in the dtype of `u`, and the last K-1 valid inputs in the accumulation dtype.

    With `order` (B, L), place i of out and mask is token order[i] of u. The inputs, and those that the state
    keeps, are u times `scale`.
    """
    u = scaled(u if order is None else take(u, order), scale)
    packing, taps, length = Packing.of(mask), weight.shape[1], u.shape[1]
    padded = with_start(packing.pack(u), taps, initial_state)
    wide = weight.to(padded.dtype)
    out = padded[:, :length] * wide[:, 0]
    for tap in range(1, taps):
        out.addcmul_(padded[:, tap : tap + length], wide[:, tap])
    if bias is not None:
        out += bias.to(out.dtype)
    return packing.unpack(out.to(u.dtype)), take(padded, packing.last(padded, taps - 1))


@without_autocast
def forward_parts(
    parts: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    initial_state: Tensor | None,
    order: Tensor | None,
    scales: tuple[float, ...],
) -> tuple[list[Tensor], Tensor]:
    """`forward` of some u, each with its own scale: their channels follow each other in weight, bias and
    state.
    """
    sizes = [part.shape[2] for part in parts]
    own = by_part(weight, sizes, 0), by_part(bias, sizes, 0), by_part(initial_state, sizes, 2)
    given = zip(parts, *own, scales, strict=True)
    found = [forward(*each, mask, start, order, scale) for *each, start, scale in given]
    outs, states = zip(*found, strict=True)
    return list(outs), joined(states, 2)


@without_autocast
def gradient(
    out_grad: Tensor,
    final_grad: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    initial_state: Tensor | None,
    order: Tensor | None,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of u, weight, bias and initial_state in the accumulation dtype, none a view of another."""
    packing, taps, length = Packing.of(mask), weight.shape[1], u.shape[1]
    u = scaled(u if order is None else take(u, order), scale)
    padded = with_start(packing.pack(u), taps, initial_state)
    wide, grad = weight.to(padded.dtype), packing.pack(out_grad.to(padded.dtype))
    padded_grad = torch.zeros_like(padded)
    last = packing.last(padded, taps - 1)[..., None].expand(-1, -1, u.shape[2])
    padded_grad.scatter_(1, last, final_grad.to(padded.dtype))
    weight_grad = torch.empty_like(wide)
    for tap in range(taps):
        shifted = slice(tap, tap + length)
        padded_grad[:, shifted].addcmul_(grad, wide[:, tap])
        weight_grad[:, tap] = (grad * padded[:, shifted]).sum((0, 1))
    u_grad = scaled(packing.unpack(padded_grad[:, taps - 1 :]), scale)
    return (
        u_grad.clone() if order is None else take(u_grad, order.argsort(dim=1)),
        weight_grad,
        None if bias is None else grad.sum((0, 1)),
        None if initial_state is None else padded_grad[:, : taps - 1].clone(),
    )


def by_part(tensor: Tensor | None, sizes: list[int], dim: int) -> tuple[Tensor | None, ...]:
    """A tensor split along its channels; None for each part if there is none."""
    return (None,) * len(sizes) if tensor is None else tensor.split_with_sizes(sizes, dim)


def joined(parts: tuple[Tensor | None, ...], dim: int) -> Tensor | None:
    """The inverse of `by_part`."""
    return None if parts[0] is None else torch.cat(parts, dim)


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """`tensor` times `scale`, in its dtype."""
    return tensor if scale == 1 else tensor * scale


def with_start(u: Tensor, taps: int, initial_state: Tensor | None) -> Tensor:
    """The K-1 inputs before the first in front, in the accumulation dtype: (B, K-1+L, channels)."""
    accumulate = accumulation_dtype(u.dtype)
    if initial_state is None:
        initial_state = u.new_zeros(u.shape[0], taps - 1, u.shape[2])
    return torch.cat([initial_state.to(accumulate), u.to(accumulate)], dim=1)


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """tensor (B, L, channels), index (B, M) -> (B, M, channels): rows of the same batch entry."""
    start = torch.arange(tensor.shape[0], device=tensor.device)[:, None] * tensor.shape[1]
    rows = tensor.flatten(0, 1).index_select(0, (index + start).flatten())
    return rows.view(*index.shape, tensor.shape[2])
