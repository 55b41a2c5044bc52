# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernel for the scan's scalars, one per token and head, that the other kernels multiply with.

Letters and equations as in `torch_engine.decays`; the axis of directions holds the forward one and,
where there is vision, the reverse one. Sums of steps are made in float64 and rounded once, so that the same
sum is the same number wherever it stands: added up in float32, in the order that a GPU chooses, two sums of
2,560 with nothing between them differ by 2e-4, and so does the weight of what was written there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...engine.launch import as_bytes, ceil_div, contiguous, power_of_2
from ...layout.segments import next_segment, openings_of, vision_mask
from ..operator import ScanInputs
from .tiles import decayed, token_rows

HEADS_AT_ONCE = 16


@dataclass(frozen=True)
class Scalars:
    """Float32, (directions, B, K, H, C) unless said."""

    dt: Tensor  # (B, K, H, C), 0 where masked
    sums: Tensor  # f and b of eq. (1)
    gates: Tensor | None  # on vision the gate and 1 less it, on text 1 and 0; None without any segment
    read_decay: Tensor  # of the state that enters a chunk, until token i reads it; the gate left out
    write_weight: Tensor  # dt_j times the decay of token j's write until the state leaves the chunk
    chunk_decay: Tensor  # (directions, B, K, H): of a state that passes the chunk
    segment: Tensor | None  # (B, K, C) int32, -1 on text and where masked
    opens: Tensor | None  # (B, K + 1) int64: `next_segment`
    valid: Tensor | None  # (B, L) bytes
    begin: Tensor | None  # (B, K, C) int32: where the token's sample does, from the chunk's start, < 0 before

    @property
    def gated_read(self) -> Tensor:
        """What a token's output takes of the state that enters its chunk."""
        return self.read_decay if self.gates is None else self.read_decay * self.gates

    def arguments(self) -> dict[str, Any]:
        """What kernels read for the pairs of a chunk, under the names that all of them give it."""
        both = self.gates is not None
        chunks, heads, chunk = self.sums.shape[2:]
        return {
            "DT": self.dt,
            "FORWARD_SUM": self.sums[0],
            "REVERSE_SUM": self.sums[1] if both else None,
            "FORWARD_GATE": self.gates[0] if both else None,
            "REVERSE_GATE": self.gates[1] if both else None,
            "SEGMENT": self.segment,
            "BEGIN": self.begin,
            "VALID": self.valid,
            "chunks": chunks,
            "HEADS": heads,
            "CHUNK": chunk,
            "HAS_VALID": self.valid is not None,
            "HAS_VISION": both,
            "HAS_SEQUENCE": self.begin is not None,
        }

    def by_direction(self, name: str, tensor: Tensor) -> dict[str, Tensor | None]:
        """`tensor`, (directions, ...), as arguments FORWARD_name and REVERSE_name."""
        return {f"FORWARD_{name}": tensor[0], f"REVERSE_{name}": tensor[1] if len(tensor) > 1 else None}


@triton.jit
def head_scalars(POINTER, batch, stride_batch, rows, stride_token, heads, stride_head, inside):
    """(tokens, heads) of a (B, L, H) tensor in float32, 0 outside."""
    where = POINTER + batch * stride_batch + rows[:, None] * stride_token + heads[None, :] * stride_head
    return tl.load(where, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def summed_steps(dt, rate):
    """Σ_{k≤i} dt_k A in float64, (tokens, heads)."""
    return tl.cumsum(dt.to(tl.float64) * rate.to(tl.float64), 0)


@triton.jit(do_not_specialize=["chunks"])
def scalars_kernel(
    TIME_STEP, A, GATE, IDS, VALID, OPENS, BEGINS, DT, SUMS, GATES, READ_DECAY, WRITE_WEIGHT, CHUNK_DECAY,
    SEGMENT, BEGIN,
    step_batch, step_token, step_head, gate_batch, gate_token, gate_head, length, chunks,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_VISION: tl.constexpr, HAS_SEQUENCE: tl.constexpr,
):  # fmt: skip
    """`scan_decays`, and the weights of reads and writes, for one chunk and a block of heads."""
    chunk = tl.program_id(0)
    heads = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.cast(tl.program_id(2), tl.int64)
    place = tl.arange(0, CHUNK)[:, None]
    rows, valid = token_rows(VALID, batch, chunk * CHUNK, length, CHUNK, HAS_VALID)
    real = (heads < HEADS)[None, :]
    dt = head_scalars(TIME_STEP, batch, step_batch, rows, step_token, heads, step_head, valid[:, None] & real)
    rate = tl.load(A + heads, mask=heads < HEADS, other=0.0).to(tl.float32)[None, :]
    forward_sum = summed_steps(dt, rate)
    end = tl.sum(tl.where(place == CHUNK - 1, forward_sum, 0.0), 0)
    at_chunk = (batch * chunks + chunk) * HEADS + heads
    at = at_chunk[None, :] * CHUNK + place
    tl.store(DT + at, dt, mask=real)
    tl.store(SUMS + at, forward_sum.to(tl.float32), mask=real)
    read, passed = decayed(forward_sum.to(tl.float32)), decayed(end.to(tl.float32))
    write = decayed((end[None, :] - forward_sum).to(tl.float32)) * dt
    if (
        HAS_SEQUENCE
    ):  # the state that enters is of a sample that begins before, what leaves is of the last one
        first = tl.cast(chunk, tl.int64) * CHUNK
        last = tl.load(BEGINS + batch * length + tl.minimum(first + CHUNK, length) - 1)
        begin = tl.load(BEGINS + batch * length + rows, mask=rows < length, other=0)
        begin = (tl.where(rows < length, begin, last) - first)[:, None]
        if tl.program_id(1) == 0:
            tl.store(BEGIN + (batch * chunks + chunk) * CHUNK + place, begin.to(tl.int32))
        read = tl.where(begin < 0, read, 0.0)
        write = tl.where(place >= last - first, write, 0.0)
        passed = tl.where(last < first, passed, 0.0)
    tl.store(READ_DECAY + at, read, mask=real)
    tl.store(WRITE_WEIGHT + at, write, mask=real)
    tl.store(CHUNK_DECAY + at_chunk, passed, mask=heads < HEADS)
    if HAS_VISION:
        beyond = tl.cast(tl.num_programs(2), tl.int64) * chunks * HEADS  # the next direction's chunks
        segment = tl.load(IDS + batch * length + rows, mask=valid, other=-1)[:, None]
        is_vision = segment >= 0
        if tl.program_id(1) == 0:
            tl.store(SEGMENT + (batch * chunks + chunk) * CHUNK + place, segment.to(tl.int32))
        opens = OPENS + batch * (chunks + 1) + chunk
        left, right = tl.load(opens), tl.load(opens + 1)
        preceding, counted = vision_before(IDS, VALID, batch, rows, length, CHUNK, HAS_VALID)
        steps = head_scalars(
            TIME_STEP, batch, step_batch, preceding, step_token, heads, step_head, counted[:, None] & real
        )
        reverse_sum = summed_steps(steps, rate)
        own = tl.where(is_vision, dt, 0.0).to(tl.float64) * rate.to(tl.float64)
        end = tl.sum(tl.where(place == CHUNK - 1, reverse_sum + own, 0.0), 0)
        gate = head_scalars(GATE, batch, gate_batch, rows, gate_token, heads, gate_head, is_vision & real)
        tl.store(GATES + at, tl.where(is_vision, gate, 1.0), mask=real)
        chunk_decay = tl.where(left == right, decayed(end.to(tl.float32)), 0.0)
        tl.store(CHUNK_DECAY + beyond + at_chunk, chunk_decay, mask=heads < HEADS)
        at += beyond * CHUNK
        tl.store(SUMS + at, reverse_sum.to(tl.float32), mask=real)
        tl.store(GATES + at, tl.where(is_vision, 1.0 - gate, 0.0), mask=real)
        read, write = (
            decayed((end[None, :] - reverse_sum).to(tl.float32)),
            decayed(reverse_sum.to(tl.float32)),
        )
        tl.store(READ_DECAY + at, tl.where(segment == right, read, 0.0), mask=real)
        tl.store(WRITE_WEIGHT + at, tl.where(segment == left, write * dt, 0.0), mask=real)


@triton.jit
def vision_before(IDS, VALID, batch, rows, length, CHUNK: tl.constexpr, HAS_VALID: tl.constexpr):
    """The token before each of a chunk, and whether it is a vision token of the same chunk."""
    rows -= 1
    counted = (tl.arange(0, CHUNK) > 0) & (rows < length)
    if HAS_VALID:
        counted = counted & (tl.load(VALID + batch * length + rows, mask=counted, other=0) != 0)
    return rows, counted & (tl.load(IDS + batch * length + rows, mask=counted, other=-1) >= 0)


def scan_scalars(inputs: ScanInputs, chunk: int) -> Scalars:
    """Mask, pad with masked tokens, cut into chunks of so many tokens and sum, in one launch."""
    dt, gate, segment = inputs.dt, inputs.gate, inputs.segment
    batch, length, heads = dt.shape
    chunks = ceil_div(length, chunk)
    directions = 1 if segment is None else 2

    def empty(*shape: int) -> Tensor:
        return dt.new_empty(shape, dtype=torch.float32)

    opens = None
    if segment is not None:
        segment = segment.to(torch.int64).contiguous()
        if inputs.openings is None:
            opens = next_segment(segment, vision_mask(segment, inputs.valid), chunk).contiguous()
        else:
            opens = openings_of(inputs.openings, length, chunk).contiguous()
    scalars = Scalars(
        dt=empty(batch, chunks, heads, chunk),
        sums=empty(directions, batch, chunks, heads, chunk),
        gates=None if segment is None else empty(directions, batch, chunks, heads, chunk),
        read_decay=empty(directions, batch, chunks, heads, chunk),
        write_weight=empty(directions, batch, chunks, heads, chunk),
        chunk_decay=empty(directions, batch, chunks, heads),
        segment=None if segment is None else empty(batch, chunks, chunk).view(torch.int32),
        opens=opens,
        valid=as_bytes(inputs.valid),
        begin=None if inputs.begins is None else inputs.begins.new_empty(batch, chunks, chunk),
    )
    block = min(HEADS_AT_ONCE, power_of_2(heads))
    scalars_kernel[(chunks, ceil_div(heads, block), batch)](
        dt,
        inputs.A.contiguous(),
        gate,
        segment,
        scalars.valid,
        opens,
        contiguous(inputs.begins),
        scalars.dt,
        scalars.sums,
        scalars.gates,
        scalars.read_decay,
        scalars.write_weight,
        scalars.chunk_decay,
        scalars.segment,
        scalars.begin,
        *dt.stride(),
        *((0, 0, 0) if gate is None else gate.stride()),
        length=length,
        chunks=chunks,
        HEADS=heads,
        BLOCK=block,
        CHUNK=chunk,
        HAS_VALID=scalars.valid is not None,
        HAS_VISION=segment is not None,
        HAS_SEQUENCE=scalars.begin is not None,
    )
    return scalars
