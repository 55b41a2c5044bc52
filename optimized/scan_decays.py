"""The scan's scalars, one per token and head, that the torch engine multiplies its matrices with.

Letters: B batch, L tokens, H heads, K chunks of C tokens. Inside a chunk i is the reading and j the writing
token.

    f_i = Σ_{k≤i} a_k,  a = dt A          b_i = Σ_{k<i} a_k over vision only                              (1)

The forward state that enters a chunk is read with e^{f_i} and written to with e^{f_end - f_j} dt_j; the
backward state, which enters at its end, with e^{b_end - b_i} and e^{b_j} dt_j. All exponents are ≤ 0 and
clamped there. Sums are float64: in float32 one large step swallows the small ones after it. `scan_scalars`
has the kernels' own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan_masks import next_segment, vision_mask


@dataclass(frozen=True)
class Decays:
    """Scalars in the accumulation dtype, (B, K, H, C) unless said; None without any segment."""

    dt: Tensor  # 0 where masked
    A: Tensor  # (H,)
    forward_sum: Tensor  # f of eq. (1)
    forward_gate: Tensor  # the gate on vision, 1 on text; (B, K, 1, C) without any segment
    backward_sum: Tensor | None = None  # b of eq. (1)
    backward_total: Tensor | None = None  # b_end, (B, K, H, 1)
    backward_gate: Tensor | None = None  # 1 - gate on vision, 0 on text
    segment: Tensor | None = None  # (B, K, 1, C), -1 where masked
    opens: Tensor | None = (
        None  # (B, K+1): segment of the first vision token from each chunk's start on, or -1
    )

    def exp(self, exponent: Tensor) -> Tensor:
        """e to a difference of sums, at most 1, in the accumulation dtype."""
        return exponent.to(self.dt.dtype).clamp_max(0).exp_()

    def forward_kept(self) -> Tensor:
        """e^{f_end}: what a chunk leaves of the state that enters it, (B, K, H)."""
        return self.exp(self.forward_sum[..., -1])

    def backward_kept(self) -> Tensor:
        """e^{b_end}, 0 where another segment opens inside the chunk, (B, K, H)."""
        same = self.opens[:, 1:] == self.opens[:, :-1]
        return self.exp(self.backward_total[..., 0]) * same[..., None]

    def forward_read(self) -> Tensor:
        """e^{f_i}, without the gate."""
        return self.exp(self.forward_sum)

    def backward_read(self) -> Tensor:
        """e^{b_end - b_i}, without the gate, 0 outside the segment that enters at the chunk's end."""
        reads = self.segment == self.opens[:, 1:, None, None]
        return self.exp(self.backward_total - self.backward_sum) * reads

    def forward_reach(self) -> Tensor:
        """e^{f_end - f_j}: what is left of token j's write at the end of its chunk."""
        total = self.forward_sum[..., -1:]
        return self.exp(total - self.forward_sum)

    def backward_reach(self) -> Tensor:
        """e^{b_j}: what is left at the chunk's start, 0 outside the segment that leaves there."""
        writes = self.segment == self.opens[:, :-1, None, None]
        return self.exp(self.backward_sum) * writes


def scan_decays(
    dt: Tensor,
    A: Tensor,
    gate: Tensor | None,
    segment: Tensor | None,
    valid: Tensor | None,
    chunk: int,
    dtype: torch.dtype,
) -> Decays:
    """Mask, pad with masked tokens and cut into chunks; eq. (1), summed in float64."""
    vision = vision_mask(segment, valid)

    def scalars(tensor: Tensor, mask: Tensor | None, fill: float = 0) -> Tensor:
        return cut_tokens(tensor, mask, chunk, dtype, fill).transpose(2, 3).contiguous()

    dt, A = scalars(dt, valid), A.to(dtype)
    step = dt.double() * A.double()[:, None]  # (B, K, H, C)
    forward_sum = step.cumsum(-1)
    if vision is None:
        return Decays(dt, A, forward_sum, torch.ones_like(dt[:, :, :1]))
    is_vision = split_tokens(vision, chunk, False)[:, :, None]  # (B, K, 1, C)
    inclusive = (step * is_vision).cumsum(-1)
    forward_gate = scalars(gate, vision, fill=1)
    return Decays(
        dt=dt,
        A=A,
        forward_sum=forward_sum,
        forward_gate=forward_gate,
        backward_sum=F.pad(inclusive[..., :-1], (1, 0)),
        backward_total=inclusive[..., -1:],
        backward_gate=(1 - forward_gate) * is_vision,
        segment=split_tokens(torch.where(vision, segment, -1), chunk, -1)[:, :, None],
        opens=next_segment(segment, vision, chunk),
    )


def cut_tokens(
    tensor: Tensor, mask: Tensor | None, chunk: int, dtype: torch.dtype, fill: float = 0
) -> Tensor:
    """(B, L, ...) -> (B, K, C, ...) in `dtype`, with `fill` where the mask is False and after the end."""
    tensor = tensor.to(dtype)
    if mask is not None:
        tensor = torch.where(unsqueeze_like(mask, tensor), tensor, tensor.new_full((), fill))
    return split_tokens(tensor, chunk, fill)


def split_tokens(tensor: Tensor, chunk: int, fill: float) -> Tensor:
    """(B, L, ...) -> (B, K, C, ...), the last chunk padded with `fill`."""
    missing = -tensor.shape[1] % chunk
    if missing:
        tail = tensor.new_full((tensor.shape[0], missing, *tensor.shape[2:]), fill)
        tensor = torch.cat([tensor, tail], dim=1)
    return tensor.unflatten(1, (-1, chunk))


def join_tokens(tensor: Tensor, length: int) -> Tensor:
    """(B, K, C, ...) -> (B, L, ...): the inverse of `split_tokens`."""
    return tensor.flatten(1, 2)[:, :length]


def unsqueeze_like(mask: Tensor, tensor: Tensor) -> Tensor:
    """(B, L) -> (B, L, 1, ...) with the axes of `tensor`."""
    return mask.reshape(*mask.shape, *(1,) * (tensor.ndim - 2))


def reverse_cumsum(tensor: Tensor) -> Tensor:
    """Σ_{i≥k} over the last axis, summed from the right: a total minus a prefix would cancel."""
    return tensor.flip(-1).cumsum(-1).flip(-1)
