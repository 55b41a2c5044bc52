# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernels for the states between chunks: of the scan and of its gradient, in both directions.

Letters: B batch, L tokens, H heads, G groups, N state size, P head dim, K chunks of C tokens, R runs of
chunks.

    S(after chunk) = kept · S(before) + Σ_j weight_j left_j ⊗ right_j                                      (1)

with left, right, weight = B, x, write for the scan (eqs. (4), (5) of `chunked_scan`) and C, ȳ, read for its
gradient (eq. (2) of `chunked_scan_backward`). Chunks go one after the other inside a run, runs side by side:
one sweep leaves what each run adds, `link_runs` joins them, a second sweep starts from the joined states and
stores every chunk's. States are float32, and stored as the products that read them take them: in the dtype of
the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scan_tiles import (
    add_product,
    head_of,
    load_tile,
    part_size,
    rows_of,
    stride_arguments,
    tile_size,
    token_rows,
    warps,
)

RUN = 32  # chunks one after the other, at most
PROGRAMS = 512  # that sweep side by side at least, if there are chunks enough
BLOCKS = {torch.bfloat16: 128, torch.float32: 32}  # of P
LINKED = 512  # elements of a state that one program carries over the runs


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
    RUN_KEPT,
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
    batches,
    HEADS: tl.constexpr,
    LEFT_RATIO: tl.constexpr,
    RIGHT_RATIO: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    BACKWARDS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    LAST: tl.constexpr,
    HAS_PARTNER: tl.constexpr,
):
    """Eq. (1) over one run of one head in one direction, a block of P: `local_states` and `carry` of
    `chunked_scan`. BACKWARDS is the direction that goes from right to left.

    The LAST sweep starts from the joined states and stores what every chunk receives; the one before starts
    from nothing and stores what a run leaves.
    """
    head = tl.program_id(0) % HEADS
    run = tl.program_id(0) // HEADS
    columns_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    direction = tl.program_id(2) // batches
    batch = tl.cast(tl.program_id(2) % batches, tl.int64)
    line = tl.cast(tl.program_id(2), tl.int64)  # of all directions' rows
    columns_n = tl.arange(0, BLOCK_N)
    tile = columns_n[:, None] * P + columns_p[None, :]
    inside = (columns_n < N)[:, None] & (columns_p < P)[None, :]
    left = head_of(LEFT, batch, left_batch, head // LEFT_RATIO, left_head)
    right = head_of(RIGHT, batch, right_batch, head // RIGHT_RATIO, right_head)
    at_run = (line * runs + run) * HEADS + head
    if LAST:
        state = tl.load(START + at_run * (N * P) + tile, mask=inside, other=0.0)
    else:
        state = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    run_kept = 1.0
    count = tl.minimum(RUN, chunks - run * RUN)
    for step in range(0, count):
        chunk = run * RUN + tl.where(direction == BACKWARDS, count - 1 - step, step)
        at_chunk = (line * chunks + chunk) * HEADS + head
        if LAST:
            entering = ENTERING + at_chunk * (N * P) + tile
            tl.store(entering, state.to(ENTERING.dtype.element_ty), mask=inside)
            if HAS_PARTNER:
                partner = tl.load(PARTNER + at_chunk * (N * P) + tile, mask=inside, other=0.0)
                product = tl.sum(tl.sum(state * partner.to(tl.float32), 1), 0)
                tl.store(PRODUCT + at_chunk * tl.num_programs(1) + tl.program_id(1), product)
        kept = tl.load(KEPT + at_chunk)
        run_kept *= kept
        state *= kept
        for part in tl.static_range(0, CHUNK, ROWS):
            rows, taken = token_rows(VALID, batch, chunk * CHUNK + part, length, ROWS, HAS_VALID)
            weight = tl.load(WEIGHT + at_chunk * CHUNK + part + tl.arange(0, ROWS))
            left_tile = load_tile(left, rows, left_token, columns_n, taken, N)
            right_tile = load_tile(right, rows, right_token, columns_p, taken, P)
            weighed = (right_tile.to(tl.float32) * weight[:, None]).to(right_tile.dtype)
            state = add_product(tl.trans(left_tile), weighed, state)
    if not LAST:
        tl.store(LEAVING + at_run * (N * P) + tile, state, mask=inside)
        if tl.program_id(1) == 0:
            tl.store(RUN_KEPT + at_run, run_kept)


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
    BACKWARDS: tl.constexpr,
    HAS_START: tl.constexpr,
):
    """Replace what each run adds, in STATES, by the state that enters it: `carry` of `chunked_scan`, over
    runs. Only the first direction has a START."""
    row = tl.cast(tl.program_id(0), tl.int64)  # of a row of the batch and a head
    direction = tl.program_id(2)
    line = direction * tl.cast(tl.num_programs(0), tl.int64) + row
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < SIZE
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_START and direction == 0:
        state = tl.load(START + row * SIZE + place, mask=inside, other=0.0)
    for step in tl.range(0, runs, num_stages=4):
        run = tl.where(direction == BACKWARDS, runs - 1 - step, step)
        at_run = (line // HEADS * runs + run) * HEADS + line % HEADS
        where = STATES + at_run * SIZE + place
        added = tl.load(where, mask=inside, other=0.0)
        tl.store(where, state, mask=inside)
        state = state * tl.load(KEPT + at_run) + added
    tl.store(FINAL + line * SIZE + place, state, mask=inside)


def sweep_states(
    left: Tensor,
    right: Tensor,
    weight: Tensor,
    kept: Tensor,
    valid: Tensor | None,
    start: Tensor | None,
    *,
    turned: bool = False,
    partner: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Eq. (1) over all chunks, in one direction or both.

    Args:
        left: (B, L, H or G, N); right: (B, L, H or G, P), in one dtype.
        weight: (directions, B, K, H, C) float32; kept: (directions, B, K, H) float32.
        valid: (B, L) bytes; None = all.
        start: (B, H, N, P) float32, of the first direction; zeros if None.
        turned: the first direction goes from the last chunk to the first; if not, the second does.
        partner: (directions, B, K, H, N, P), states to multiply with.
    Returns:
        (directions, B, K, H, N, P) in the dtype of `left`, what each chunk receives; (directions, B, H, N, P)
        float32, what the last one leaves; and (directions, B, K, H), the inner product of what each chunk
        receives with its partner.
    """
    directions, batch, chunks, heads, _ = weight.shape
    sizes = (left.shape[-1], right.shape[-1])
    run = run_length(chunks, heads * batch * directions)
    runs = triton.cdiv(chunks, run)
    entering = left.new_empty(directions, batch, chunks, heads, *sizes)
    states = left.new_empty(directions, batch, runs, heads, *sizes, dtype=torch.float32)
    run_kept = kept.new_empty(directions, batch, runs, heads)
    final = left.new_empty(directions, batch, heads, *sizes, dtype=torch.float32)
    sweep = Sweep(rows_of(left), rows_of(right), weight, kept, valid, run, 0 if turned else 1)
    sweep.launch(leaving=states, run_kept=run_kept)
    link_runs(states, run_kept, start, final, sweep.backwards)
    product = sweep.launch(start=states, entering=entering, partner=partner)
    return entering, final, product


@dataclass(frozen=True)
class Sweep:
    """The arguments that both sweeps share."""

    left: Tensor
    right: Tensor
    weight: Tensor
    kept: Tensor
    valid: Tensor | None
    run: int  # chunks
    backwards: int  # the direction that goes from the last chunk to the first

    def launch(
        self,
        *,
        start: Tensor | None = None,
        entering: Tensor | None = None,
        leaving: Tensor | None = None,
        run_kept: Tensor | None = None,
        partner: Tensor | None = None,
    ) -> Tensor | None:
        """Run `sweep_kernel`; returns the inner products with `partner`, (directions, B, K, H)."""
        directions, batch, chunks, heads, chunk = self.weight.shape
        state, head_dim = self.left.shape[-1], self.right.shape[-1]
        runs, kind = triton.cdiv(chunks, self.run), self.left.dtype
        block = sweep_block(state, head_dim, kind, partner is not None)
        blocks = triton.cdiv(head_dim, block)
        product = None
        if partner is not None:
            product = self.weight.new_empty(directions, batch, chunks, heads, blocks)
        sweep_kernel[(heads * runs, blocks, batch * directions)](
            self.left,
            self.right,
            self.weight,
            self.kept,
            self.valid,
            start,
            entering,
            leaving,
            run_kept,
            partner,
            product,
            **stride_arguments(left=self.left, right=self.right),
            length=self.left.shape[1],
            chunks=chunks,
            runs=runs,
            batches=batch,
            HEADS=heads,
            LEFT_RATIO=heads // self.left.shape[2],
            RIGHT_RATIO=heads // self.right.shape[2],
            N=state,
            P=head_dim,
            BLOCK_N=tile_size(state),
            BLOCK_P=block,
            CHUNK=chunk,
            ROWS=part_size(kind, chunk),
            RUN=self.run,
            BACKWARDS=self.backwards,
            HAS_VALID=self.valid is not None,
            LAST=start is not None,
            HAS_PARTNER=partner is not None,
            num_warps=warps(state, block),
            num_stages=3,
        )
        return None if product is None else product.sum(-1)


def run_length(chunks: int, lines: int) -> int:
    """Chunks per run: a power of two, as long as enough programs are left for `lines` heads and rows."""
    run = RUN
    while run > 1 and triton.cdiv(chunks, run) * lines < PROGRAMS:
        run //= 2
    return run


def sweep_block(state: int, head_dim: int, kind: torch.dtype, partnered: bool) -> int:
    """How much of P a sweep carries at once: half of it where a partner takes registers too."""
    block = min(tile_size(head_dim), BLOCKS[kind] * 128 // max(128, tile_size(state)))
    return max(16, block // 2) if partnered else block


def link_runs(states: Tensor, kept: Tensor, start: Tensor | None, final: Tensor, backwards: int) -> None:
    """`link_kernel` over (directions, B, R, H, N, P) `states`, overwritten; `final` receives the rest."""
    directions, batch, runs, heads = kept.shape
    size = states.shape[-2] * states.shape[-1]
    block = min(triton.next_power_of_2(size), LINKED)
    start = None if start is None else start.to(torch.float32).contiguous()
    link_kernel[(batch * heads, triton.cdiv(size, block), directions)](
        start,
        states,
        kept,
        final,
        runs,
        HEADS=heads,
        SIZE=size,
        BLOCK=block,
        BACKWARDS=backwards,
        HAS_START=start is not None,
    )
