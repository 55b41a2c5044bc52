# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernels for the states between chunks: of the scan and of its gradient, in both directions.

Letters: B batch, L tokens, H heads, G groups, N state size, P head dim, K chunks of C tokens, R runs of
chunks.

    S(after chunk) = kept · S(before) + Σ_j weight_j left_j ⊗ right_j                                      (1)

with left, right, weight = B, x, write for the scan (eqs. (4), (5) of `chunked_scan`) and C, ȳ, read for its
gradient (eq. (2) of `chunked_scan_backward`). Chunks go one after the other inside a run, runs side by side:
one sweep leaves what each run adds, `link_runs` joins them, a second sweep starts from the joined states and
stores every chunk's. States are float32, and stored as the products that read them take them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scan_tiles import (
    as_bytes,
    as_factor,
    chunk_rows,
    head_of,
    load_tile,
    precision,
    rows_of,
    stride_arguments,
    tile_size,
)

RUN = 16  # chunks
BLOCKS = {torch.bfloat16: 64, torch.float32: 32}  # of P


@triton.jit
def sweep_kernel(
    LEFT,
    RIGHT,
    WEIGHT,
    KEPT,
    VALID,
    START,
    ENTERING,
    LEAVING,
    PARTNER,
    PRODUCT,
    left_batch,
    left_token,
    left_head,
    right_batch,
    right_token,
    right_head,
    length,
    chunks,
    runs,
    HEADS: tl.constexpr,
    LEFT_RATIO: tl.constexpr,
    RIGHT_RATIO: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHUNK: tl.constexpr,
    RUN: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_START: tl.constexpr,
    STORES: tl.constexpr,
    LEAVES: tl.constexpr,
    HAS_PARTNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Eq. (1) over one run of one head, a block of P: `local_states` and `carry` of `chunked_scan`."""
    head = tl.program_id(0) % HEADS
    run = tl.program_id(0) // HEADS
    columns_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    batch = tl.cast(tl.program_id(2), tl.int64)
    columns_n = tl.arange(0, BLOCK_N)
    tile = columns_n[:, None] * P + columns_p[None, :]
    inside = (columns_n < N)[:, None] & (columns_p < P)[None, :]
    left = head_of(LEFT, batch, left_batch, head // LEFT_RATIO, left_head)
    right = head_of(RIGHT, batch, right_batch, head // RIGHT_RATIO, right_head)
    at_run = ((batch * runs + run) * HEADS + head) * (N * P)
    state = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    if HAS_START:
        state = tl.load(START + at_run + tile, mask=inside, other=0.0)
    count = tl.minimum(RUN, chunks - run * RUN)
    for step in range(0, count):
        chunk = run * RUN + (count - 1 - step if REVERSE else step)
        at_chunk = (batch * chunks + chunk) * HEADS + head
        rows, taken = chunk_rows(VALID, batch, chunk, length, CHUNK, HAS_VALID)
        if STORES:
            tl.store(ENTERING + at_chunk * (N * P) + tile, as_factor(state, PRECISION), mask=inside)
        if HAS_PARTNER:
            partner = tl.load(PARTNER + at_chunk * (N * P) + tile, mask=inside, other=0.0)
            product = tl.sum(tl.sum(state * partner, 1), 0)
            block = at_chunk * tl.num_programs(1) + tl.program_id(1)
            tl.store(PRODUCT + block, product)
        weight = tl.load(WEIGHT + at_chunk * CHUNK + tl.arange(0, CHUNK))
        kept = tl.load(KEPT + at_chunk)
        left_tile = load_tile(left, rows, left_token, columns_n, taken, N)
        right_tile = load_tile(right, rows, right_token, columns_p, taken, P)
        right_tile = as_factor(right_tile.to(tl.float32) * weight[:, None], PRECISION)
        left_tile = left_tile.to(tl.float32)
        state = tl.dot(tl.trans(left_tile), right_tile, state * kept, input_precision=PRECISION)
    if LEAVES:
        tl.store(LEAVING + at_run + tile, state, mask=inside)


@triton.jit
def link_kernel(
    START,
    STATES,
    KEPT,
    FINAL,
    runs,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_START: tl.constexpr,
):
    """Replace what each run adds, in STATES, by the state that enters it: `carry` of `chunked_scan`, over
    runs."""
    row = tl.cast(tl.program_id(0), tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < SIZE
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_START:
        state = tl.load(START + row * SIZE + place, mask=inside, other=0.0)
    for step in range(0, runs):
        run = runs - 1 - step if REVERSE else step
        at_run = (row // HEADS * runs + run) * HEADS + row % HEADS
        where = STATES + at_run * SIZE + place
        added = tl.load(where, mask=inside, other=0.0)
        tl.store(where, state, mask=inside)
        state = state * tl.load(KEPT + at_run) + added
    tl.store(FINAL + row * SIZE + place, state, mask=inside)


def sweep_states(
    left: Tensor,
    right: Tensor,
    weight: Tensor,
    kept: Tensor,
    valid: Tensor | None,
    start: Tensor | None,
    *,
    reverse: bool = False,
    partner: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Eq. (1) over all chunks.

    Args:
        left: (B, L, H or G, N); right: (B, L, H or G, P), in one dtype.
        weight: (B, K, H, C) float32; kept: (B, K, H) float32.
        valid: (B, L) bool; None = all.
        start: (B, H, N, P) float32; zeros if None.
        reverse: from the last chunk to the first.
        partner: (B, K, H, N, P), states to multiply with.
    Returns:
        (B, K, H, N, P), what each chunk receives; (B, H, N, P) float32, what the last one leaves; and (B, K,
        H), the inner product of what each chunk receives with its partner.
    """
    batch, chunks, heads, _ = weight.shape
    sizes = (left.shape[-1], right.shape[-1])
    runs = triton.cdiv(chunks, RUN)
    entering = left.new_empty(batch, chunks, heads, *sizes, dtype=torch.float32)
    states = left.new_empty(batch, runs, heads, *sizes, dtype=torch.float32)
    final = left.new_empty(batch, heads, *sizes, dtype=torch.float32)
    sweep = Sweep(left, right, weight, kept, valid, reverse)
    sweep.launch(leaving=states)
    padded = torch.nn.functional.pad(kept, (0, 0, 0, runs * RUN - chunks), value=1.0)
    link_runs(states, padded.unflatten(1, (runs, RUN)).prod(2), start, final, reverse)
    product = sweep.launch(start=states, entering=entering, partner=partner)
    return entering, final, product


class Sweep:
    """The arguments that both sweeps of one direction share."""

    def __init__(self, left, right, weight, kept, valid, reverse) -> None:
        self.left, self.right = rows_of(left), rows_of(right)
        self.weight, self.kept, self.reverse = weight.contiguous(), kept.contiguous(), reverse
        self.valid = as_bytes(valid)

    def launch(
        self,
        *,
        start: Tensor | None = None,
        entering: Tensor | None = None,
        leaving: Tensor | None = None,
        partner: Tensor | None = None,
    ) -> Tensor | None:
        """Run `sweep_kernel`; returns the inner products with `partner`, (B, K, H)."""
        batch, chunks, heads, chunk = self.weight.shape
        state, head_dim = self.left.shape[-1], self.right.shape[-1]
        runs = triton.cdiv(chunks, RUN)
        block = min(tile_size(head_dim), BLOCKS[self.left.dtype])
        blocks = triton.cdiv(head_dim, block)
        product = None
        if partner is not None:
            product = self.weight.new_empty(batch, chunks, heads, blocks)
        sweep_kernel[(heads * runs, blocks, batch)](
            self.left,
            self.right,
            self.weight,
            self.kept,
            self.valid,
            start,
            entering,
            leaving,
            partner,
            product,
            **stride_arguments(left=self.left, right=self.right),
            length=self.left.shape[1],
            chunks=chunks,
            runs=runs,
            HEADS=heads,
            LEFT_RATIO=heads // self.left.shape[2],
            RIGHT_RATIO=heads // self.right.shape[2],
            N=state,
            P=head_dim,
            BLOCK_N=tile_size(state),
            BLOCK_P=block,
            CHUNK=chunk,
            RUN=RUN,
            REVERSE=self.reverse,
            HAS_VALID=self.valid is not None,
            HAS_START=start is not None,
            STORES=entering is not None,
            LEAVES=leaving is not None,
            HAS_PARTNER=partner is not None,
            PRECISION=precision(self.left.dtype),
            num_warps=8 if state > 64 else 4,
            num_stages=2,
        )
        return None if product is None else product.sum(-1)


def link_runs(states: Tensor, kept: Tensor, start: Tensor | None, final: Tensor, reverse: bool) -> None:
    """`link_kernel` over (B, R, H, N, P) `states`, overwritten; `final` (B, H, N, P) receives the rest."""
    batch, runs, heads = kept.shape
    size = states.shape[-2] * states.shape[-1]
    block = min(triton.next_power_of_2(size), 1024)
    start = None if start is None else start.to(torch.float32).contiguous()
    link_kernel[(batch * heads, triton.cdiv(size, block))](
        start,
        states,
        kept,
        final,
        runs,
        HEADS=heads,
        SIZE=size,
        BLOCK=block,
        REVERSE=reverse,
        HAS_START=start is not None,
    )
