"""How the torch engine of the scan lays its tokens out: in chunks, what one product works on side by side.

Letters: B batch, L tokens, H heads, G groups, N state size, P head dim, K chunks of C tokens. Chunks come
first, so that a slab, a run of chunks small enough for a processor's cache, is one block of memory for the
whole batch, and its axes (K, B, G or H) flatten into the batch of one matrix product. The H/G heads of a
group are neighbours: what they share multiplies all of them at once, as rows of one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

from torch import Tensor

from ...precision import accumulation_dtype
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
    kept: Tensor  # (K, B, H): what is left of a state that passes the chunk
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
    backward: Direction | None  # None without any segment, or in chunks of text

    @property
    def directions(self) -> tuple[Direction, ...]:
        """The forward one, and the backward one if there is one."""
        return (self.forward,) if self.backward is None else (self.forward, self.backward)

    @property
    def sizes(self) -> tuple[int, ...]:
        """K, B, H, C, G, N, P."""
        return *self.C.shape[:4], *self.B.shape[2:4], self.x.shape[-1]

    @cached_property
    def slabs(self) -> list[tuple[slice, Chunks]]:
        """Runs of chunks whose score matrices fit the slab; text alone has no backward direction."""
        count, batch, heads, chunk = self.C.shape[:4]
        elements = SLAB_ELEMENTS.get(self.C.device.type, 2**20)
        step = max(1, elements // (batch * heads * chunk * chunk))
        runs = (slice(start, min(start + step, count)) for start in range(0, count, step))
        return [(where, sliced(self, where).without_idle_direction()) for where in runs]

    def without_idle_direction(self) -> Chunks:
        """Without the backward direction if all is text. Only on a CPU: it would wait for another device."""
        if self.segment is None or self.segment.device.type != "cpu" or bool((self.segment >= 0).any()):
            return self
        return replace(self, backward=None)

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


def cut(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    gate: Tensor | None,
    segment: Tensor | None,
    valid: Tensor | None,
) -> Chunks:
    """Mask, pad with masked tokens and cut into chunks."""
    dtype, chunk = accumulation_dtype(x.dtype), min(CHUNK, x.shape[1])
    x, B, C = (cut_tokens(tensor, valid, chunk, dtype) for tensor in (x, B, C))
    decays = scan_decays(dt, A, gate, segment, valid, chunk, dtype)
    return Chunks(
        x=x.permute(1, 0, 3, 2, 4).contiguous(),
        B=B.permute(1, 0, 3, 4, 2).contiguous(),
        C=C.permute(1, 0, 3, 2, 4).contiguous(),
        dt=chunk_first(decays.dt),
        segment=None if segment is None else chunk_first(decays.segment),
        forward=forward_direction(decays),
        backward=None if segment is None else backward_direction(decays),
    )


def forward_direction(decays: Decays) -> Direction:
    """The scalars of the forward direction."""
    read, reach, kept = decays.forward_read(), decays.forward_reach(), decays.forward_kept()
    return direction(False, decays.dt, decays.forward_gate, read, reach, kept, *decays.forward_sum())


def backward_direction(decays: Decays) -> Direction:
    """The scalars of the backward direction."""
    read, reach, kept = decays.backward_read(), decays.backward_reach(), decays.backward_kept()
    rounded, rest = decays.backward_sum()
    return direction(True, decays.dt, decays.backward_gate, read, reach, kept, -rounded, -rest)


def direction(
    reverse: bool,
    dt: Tensor,
    gate: Tensor,
    read: Tensor,
    reach: Tensor,
    kept: Tensor,
    rounded: Tensor,
    rest: Tensor,
) -> Direction:
    """A direction of scalars (B, K, ...)."""
    scalars = gate, read, reach, kept, read * gate, reach * dt, rounded, rest
    return Direction(reverse, *map(chunk_first, scalars))


def chunk_first(tensor: Tensor) -> Tensor:
    """(B, K, ...) -> (K, B, ...)."""
    return tensor.transpose(0, 1).contiguous()


def token_rows(tensor: Tensor, length: int) -> Tensor:
    """(K, B, H or G, C, ·) -> (B, L, H or G, ·): the inverse of the cut."""
    return tensor.permute(1, 0, 3, 2, *range(4, tensor.ndim)).flatten(1, 2)[:, :length]
