"""How the torch engine of the scan lays its tokens out: in chunks, what one product works on side by side;
and the weights of the pairs of tokens of a chunk, one (C, C) matrix a head.

Letters: B batch, L tokens, H heads, G groups, N state size, P head dim, K chunks of C tokens. Chunks come
first, so that a slab, a run of chunks small enough for a processor's cache, is one block of memory for the
whole batch, and its axes (K, B, G or H) flatten into the batch of one matrix product. The H/G heads of a
group are neighbours: what they share multiplies all of them at once, as rows of one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from ....reference.numerics import accumulation_dtype
from ..operator import ScanInputs
from .decays import Decays, cut_tokens, scan_decays

CHUNK = 64
SLAB_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}  # of one (C, C) score matrix per chunk and head


@dataclass(frozen=True)
class Direction:
    """One direction's scalars, (K, B, H, C) in the accumulation dtype unless said."""

    reverse: bool
    gate: Tensor  # its share of y, 0 where it takes no part; (K, B, 1, C) without any segment
    read: Tensor  # what is left, at a token, of the state that enters its chunk; the gate left out
    reach: Tensor  # what is left, where the state leaves the chunk, of a token's write; dt left out
    chunk_decay: Tensor  # (K, B, H): what is left of a state that passes the chunk
    reads: Tensor  # read times gate
    writes: Tensor  # reach times dt
    sum: Tensor  # f or -b of `scan_decays`, whose difference s_i - s_j is the exponent of a pair ...
    rest: Tensor  # ... and what its rounding has left

    def entering(self, edges: Tensor) -> Tensor:
        """Of the states at the edges of K chunks, (K + 1, B, ...), those that enter a chunk, (K, B, ...)."""
        return edges[1:] if self.reverse else edges[:-1]

    def leaving(self, edges: Tensor) -> Tensor:
        """Of the states at the edges of K chunks, (K + 1, B, ...), those that leave a chunk, (K, B, ...)."""
        return edges[:-1] if self.reverse else edges[1:]


@dataclass(frozen=True)
class Chunks:
    """K chunks of tokens in the accumulation dtype, and their scalars."""

    x: Tensor  # (K, B, G, C, P)
    B: Tensor  # (K, B, G, N, C)
    C: Tensor  # (K, B, H, C, N)
    dt: Tensor  # (K, B, H, C)
    segment: Tensor | None  # (K, B, 1, C), -1 where masked; None without any segment
    forward: Direction
    reverse: Direction | None  # None without any segment, or in chunks of text
    begins: Tensor | None = None  # (K, B, 1, C): where the sample of a token does; None = one sample a row

    @property
    def directions(self) -> tuple[Direction, ...]:
        """The forward one, and the reverse one if there is one."""
        return (self.forward,) if self.reverse is None else (self.forward, self.reverse)

    @property
    def sizes(self) -> tuple[int, ...]:
        """K, B, H, C, G, N, P."""
        return *self.C.shape[:4], *self.B.shape[2:4], self.x.shape[-1]

    @cached_property
    def slabs(self) -> list[tuple[slice, Chunks]]:
        """Runs of chunks whose score matrices fit the slab; text alone has no reverse direction."""
        count, batch, heads, chunk = self.C.shape[:4]
        elements = SLAB_ELEMENTS.get(self.C.device.type, 2**20)
        step = max(1, elements // max(1, batch * heads * chunk * chunk))
        runs = (slice(start, min(start + step, count)) for start in range(0, count, step))
        return [(where, sliced(self, where).without_idle_direction()) for where in runs]

    def without_idle_direction(self) -> Chunks:
        """Without the reverse direction if all is text. Only on a CPU: it would wait for another device."""
        if self.segment is None or self.segment.device.type != "cpu" or bool((self.segment >= 0).any()):
            return self
        return replace(self, reverse=None)

    def by_group(self, tensor: Tensor) -> Tensor:
        """(K, B, H, rows, ·) -> (K·B·G, H/G·rows, ·): the heads of a group below each other."""
        heads, groups = self.C.shape[2], self.x.shape[2]
        return tensor.reshape(-1, heads // groups * tensor.shape[-2], tensor.shape[-1])

    def by_head(self, tensor: Tensor) -> Tensor:
        """(K·B·G, H/G·rows, ·) -> (K, B, H, rows, ·)."""
        rows = tensor.shape[1] * self.x.shape[2] // self.C.shape[2]
        return tensor.view(*self.C.shape[:3], rows, tensor.shape[2])


def matrices(tensor: Tensor) -> Tensor:
    """(..., rows, columns) -> (·, rows, columns): the batch of one matrix product."""
    return tensor.flatten(0, -3)


def sliced(part: Chunks | Direction, where: slice):
    """Some of the chunks."""
    values = ((entry.name, getattr(part, entry.name)) for entry in fields(part))
    return replace(part, **{name: slice_of(value, where) for name, value in values})


def slice_of(value, where: slice):
    """Some of the chunks of a tensor or of a direction; anything else as it is."""
    if isinstance(value, Tensor):
        return value[where]
    return sliced(value, where) if isinstance(value, Direction) else value


def cut(inputs: ScanInputs) -> Chunks:
    """Mask, pad with masked tokens and cut into chunks."""
    dtype, chunk = accumulation_dtype(inputs.x.dtype), min(CHUNK, inputs.x.shape[1])
    tokens = (inputs.x, inputs.B, inputs.C)
    x, B, C = (cut_tokens(tensor, inputs.valid, chunk, dtype) for tensor in tokens)
    decays, segment = scan_decays(inputs, chunk, dtype), inputs.segment
    return Chunks(
        x=x.permute(1, 0, 3, 2, 4).contiguous(),
        B=B.permute(1, 0, 3, 4, 2).contiguous(),
        C=C.permute(1, 0, 3, 2, 4).contiguous(),
        dt=chunk_first(decays.dt),
        segment=None if segment is None else chunk_first(decays.segment),
        forward=forward_direction(decays),
        reverse=None if segment is None else reverse_direction(decays),
        begins=None if decays.begins is None else chunk_first(decays.begins),
    )


def forward_direction(decays: Decays) -> Direction:
    """The scalars of the forward direction."""
    read, reach, chunk_decay = decays.forward_read(), decays.forward_reach(), decays.forward_chunk_decay()
    return direction(False, decays.dt, decays.forward_gate, read, reach, chunk_decay, *decays.forward_sum())


def reverse_direction(decays: Decays) -> Direction:
    """The scalars of the reverse direction."""
    read, reach, chunk_decay = decays.reverse_read(), decays.reverse_reach(), decays.reverse_chunk_decay()
    rounded, rest = decays.reverse_sum()
    return direction(True, decays.dt, decays.reverse_gate, read, reach, chunk_decay, -rounded, -rest)


def direction(
    reverse: bool,
    dt: Tensor,
    gate: Tensor,
    read: Tensor,
    reach: Tensor,
    chunk_decay: Tensor,
    rounded: Tensor,
    rest: Tensor,
) -> Direction:
    """A direction of scalars (B, K, ...)."""
    scalars = gate, read, reach, chunk_decay, read * gate, reach * dt, rounded, rest
    return Direction(reverse, *map(chunk_first, scalars))


def chunk_first(tensor: Tensor) -> Tensor:
    """(B, K, ...) -> (K, B, ...)."""
    return tensor.transpose(0, 1).contiguous()


@dataclass(frozen=True)
class Pairs:
    """Which pairs meet, in the accumulation dtype."""

    side: Tensor | None  # (K, B, 1, C, C): 1 if j < i, -1 if j > i and of one segment; None on text alone
    gates: Tensor  # gF_i [j<i] + gR_i [j>i, one segment], (K, B, H, C, C); gF + gR = 1 and, on text, gF = 1

    @classmethod
    def of(cls, slab: Chunks) -> Pairs:
        """The pairs of a slab. No later token is met by text, so gR may be 1 - gF everywhere."""
        size = slab.C.shape[3]
        earlier = slab.C.new_ones(size, size).tril_()  # and the token itself
        if slab.begins is not None:
            earlier = earlier * (slab.begins[..., :, None] == slab.begins[..., None, :])  # (K, B, 1, C, C)
        if slab.reverse is None:
            return cls(None, earlier)
        together = slab.segment[..., :, None] == slab.segment[..., None, :]
        later = (1 - earlier) * (together & (slab.segment >= 0)[..., None])
        side = earlier.tril(-1) - later
        later.diagonal(dim1=-2, dim2=-1).fill_(1)
        return cls(side, torch.addcmul(later, slab.forward.gate[..., None], side))


def pair_decays(slab: Chunks) -> Tensor:
    """The exponentials of eq. (2), (K, B, H, C, C); where all is text, anything up to 1 above the diagonal.

    f_i - f_j ≤ 0 for j ≤ i and ≥ 0 for j ≥ i, and b_j - b_i the other way round: the exponent is the lesser.
    """
    exponent = differences(slab.forward)
    if slab.reverse is not None:
        exponent = torch.minimum(exponent, differences(slab.reverse), out=exponent)
    return exponent.clamp_max_(0).exp_()


def differences(side: Direction) -> Tensor:
    """s_i - s_j of sums in two parts, (K, B, H, C, C), see `scan_decays.two_part_sum`."""
    rounded, rest = side.sum, side.rest
    return (rounded[..., :, None] - rounded[..., None, :]).add_(rest[..., :, None]).sub_(rest[..., None, :])
