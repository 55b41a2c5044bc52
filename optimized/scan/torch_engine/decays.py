"""The scan's scalars, one per token and head, that the torch engine multiplies its matrices with.

Letters: B batch, L tokens, H heads, K chunks of C tokens. Inside a chunk i is the reading and j the writing
token.

    f_i = Σ_{k≤i} a_k,  a = dt A          b_i = Σ_{k<i} a_k over vision only                              (1)

The forward state that enters a chunk is read with e^{f_i} and written to with e^{f_end - f_j} dt_j; the
reverse state, which enters at its end, with e^{b_end - b_i} and e^{b_j} dt_j. All exponents are ≤ 0 and
clamped there. One large step must not swallow the small ones after it: exponents are sums of the steps
between, from the side that they end at, and where differences of sums stand for them, those of pairs, the
sums have two parts. The kernels' own scalars: `kernels/scalars.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layout.segments import next_segment, vision_mask
from ..operator import ScanInputs


@dataclass(frozen=True)
class Decays:
    """Scalars in the accumulation dtype, (B, K, H, C) unless said; None without any segment."""

    dt: Tensor  # 0 where masked
    forward_step: Tensor  # a of eq. (1), float64
    forward_gate: Tensor  # the gate on vision, 1 on text; (B, K, 1, C) without any segment
    reverse_step: Tensor | None = None  # a over vision, 0 elsewhere, float64
    reverse_gate: Tensor | None = None  # 1 - gate on vision, 0 on text
    segment: Tensor | None = None  # (B, K, 1, C), -1 where masked
    opens: Tensor | None = (
        None  # (B, K+1): segment of the first vision token from each chunk's start on, or -1
    )
    begins: Tensor | None = None  # (B, K, 1, C): where the sample of a token does; None = one sample a row

    @property
    def chunk_start(self) -> Tensor:
        """(K, 1, 1): the place of each chunk's first token. A sample that begins before enters the chunk."""
        chunks, size = self.dt.shape[1], self.dt.shape[3]
        return torch.arange(0, chunks * size, size, device=self.dt.device)[:, None, None]

    def exp(self, exponent: Tensor) -> Tensor:
        """e to a sum of steps, at most 1, in the accumulation dtype."""
        return exponent.to(self.dt.dtype).clamp_max(0).exp_()

    def forward_chunk_decay(self) -> Tensor:
        """e^{f_end}: what a chunk leaves of the state that enters it, (B, K, H)."""
        decay = self.exp(self.forward_step.sum(-1))
        return decay if self.begins is None else decay * (self.begins[..., -1] < self.chunk_start[..., 0])

    def reverse_chunk_decay(self) -> Tensor:
        """e^{b_end}, 0 where another segment opens inside the chunk, (B, K, H)."""
        same = self.opens[:, 1:] == self.opens[:, :-1]
        return self.exp(self.reverse_step.sum(-1)) * same[..., None]

    def forward_read(self) -> Tensor:
        """e^{f_i}, without the gate, 0 where the state that enters is of an earlier sample."""
        read = self.exp(self.forward_step.cumsum(-1))
        return read if self.begins is None else read * (self.begins < self.chunk_start)

    def reverse_read(self) -> Tensor:
        """e^{b_end - b_i}, without the gate, 0 outside the segment that enters at the chunk's end."""
        reads = self.segment == self.opens[:, 1:, None, None]
        return self.exp(reverse_cumsum(self.reverse_step)) * reads

    def forward_reach(self) -> Tensor:
        """e^{f_end - f_j}: what is left of token j's write at the end of its chunk, 0 in earlier samples."""
        reach = self.exp(F.pad(reverse_cumsum(self.forward_step)[..., 1:], (0, 1)))
        return reach if self.begins is None else reach * (self.begins == self.begins[..., -1:])

    def reverse_reach(self) -> Tensor:
        """e^{b_j}: what is left at the chunk's start, 0 outside the segment that leaves there."""
        writes = self.segment == self.opens[:, :-1, None, None]
        return self.exp(before(self.reverse_step.cumsum(-1))) * writes

    def forward_sum(self) -> tuple[Tensor, Tensor]:
        """f of eq. (1) in two parts, see `two_part_sum`."""
        return two_part_sum(self.forward_step, self.dt.dtype)

    def reverse_sum(self) -> tuple[Tensor, Tensor]:
        """b of eq. (1) in two parts."""
        sums = two_part_sum(self.reverse_step, self.dt.dtype)
        return before(sums[0]), before(sums[1])


def scan_decays(inputs: ScanInputs, chunk: int, dtype: torch.dtype) -> Decays:
    """Mask, pad with masked tokens and cut into chunks; the steps of eq. (1)."""
    segment, valid = inputs.segment, inputs.valid
    vision = vision_mask(segment, valid)

    def scalars(tensor: Tensor, mask: Tensor | None, fill: float = 0) -> Tensor:
        return cut_tokens(tensor, mask, chunk, dtype, fill).transpose(2, 3).contiguous()

    dt, A = scalars(inputs.dt, valid), inputs.A.to(dtype)
    step = dt.double() * A.double()[:, None]  # (B, K, H, C)
    begins = None if inputs.begins is None else split_samples(inputs.begins, chunk)[:, :, None]
    if vision is None:
        return Decays(dt, step, torch.ones_like(dt[:, :, :1]), begins=begins)
    is_vision = split_tokens(vision, chunk, False)[:, :, None]  # (B, K, 1, C)
    after = None if inputs.openings is None else inputs.openings[:, -1]
    forward_gate = scalars(inputs.gate, vision, fill=1)
    return Decays(
        dt=dt,
        forward_step=step,
        forward_gate=forward_gate,
        reverse_step=step * is_vision,
        reverse_gate=(1 - forward_gate) * is_vision,
        segment=split_tokens(torch.where(vision, segment, -1), chunk, -1)[:, :, None],
        opens=next_segment(segment, vision, chunk, after),
        begins=begins,
    )


def two_part_sum(step: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The running sum of float64 steps over a chunk as a rounded one and the rest, both in `dtype`: rounded
    sums may be subtracted from each other, which leaves no more than their last digit, and the rests follow.

    Multiples of a unit are summed without any rounding: 2^45 of them make the largest step, and a chunk has
    at most 2^7. What is left of each step is summed apart.
    """
    largest = step.abs().amax(-1, keepdim=True).clamp_min(2.0**-900)
    unit = torch.exp2(largest.log2().ceil() - 45)
    whole = (step / unit).round() * unit
    total, left = whole.cumsum(-1), (step - whole).cumsum(-1)
    rounded = total.to(dtype)
    return rounded, (total - rounded + left).to(dtype)


def before(sums: Tensor) -> Tensor:
    """Inclusive running sums -> exclusive ones."""
    return F.pad(sums[..., :-1], (1, 0))


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


def split_samples(begins: Tensor, chunk: int) -> Tensor:
    """`sample_begins` (B, L) -> (B, K, C), the last chunk filled with what the row ends with."""
    missing = -begins.shape[1] % chunk
    return torch.cat([begins, begins[:, -1:].expand(-1, missing)], dim=1).unflatten(1, (-1, chunk))


def join_tokens(tensor: Tensor, length: int) -> Tensor:
    """(B, K, C, ...) -> (B, L, ...): the inverse of `split_tokens`."""
    return tensor.flatten(1, 2)[:, :length]


def unsqueeze_like(mask: Tensor, tensor: Tensor) -> Tensor:
    """(B, L) -> (B, L, 1, ...) with the axes of `tensor`."""
    return mask.reshape(*mask.shape, *(1,) * (tensor.ndim - 2))


def reverse_cumsum(tensor: Tensor) -> Tensor:
    """Σ_{i≥k} over the last axis, summed from the right: a total minus a prefix would cancel."""
    return tensor.flip(-1).cumsum(-1).flip(-1)
