# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernels for the states between chunks: of the scan and of its gradient, in both directions.

Letters: B batch, L tokens, H heads, G groups, N state size, P head dim, K chunks of C tokens, R runs of
chunks.

    S(after chunk) = decay · S(before) + Σ_j weight_j left_j ⊗ right_j                                     (1)

with left, right, weight = B, x, write for the scan (eqs. (4), (5) of `torch_engine`) and C, ȳ, read for its
gradient (eq. (2) of `torch_engine.backward`). A program takes chunks one after the other, for the heads of a
group side by side where they share left and right. Where there are enough heads, rows and blocks of a state
for a GPU, a program takes all chunks. Where there are not, runs of chunks go side by side: one sweep leaves
what each run adds, `link_runs` joins them, a second sweep starts from the joined states. States are float32,
and every chunk's is stored as the products that read it take it: in the dtype of the tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...engine.launch import ceil_div, power_of_2, rows_of, shared_memory, stride_arguments, tile_size
from .tiles import add_product, head_of, load_tile, token_rows, warps

ENOUGH = 64  # programs of heads that share: without runs they take as long as a GPU full with a second sweep
RUN = 32  # chunks one after the other, at most, in runs
PROGRAMS = 512  # that sweep runs side by side at least, if there are chunks enough
BLOCK_N = {torch.bfloat16: 64, torch.float32: 128}  # of N, for heads that share
WHOLE_N = 128  # of N, for a head by itself
BLOCKS = {torch.bfloat16: 128, torch.float32: 32}  # of P, for all heads that a program takes
NARROWEST = 16  # of P, for each of them: what a load takes at once from memory
STAGED_MEMORY = 200 * 1024  # bytes of shared memory that three steps of tokens take at most
LINKED = 512  # elements of a state that one program carries over the runs
ENTERED = 4096  # elements of a state that one program adds to


@triton.jit(do_not_specialize=["chunks", "runs", "run_length", "batches"])
def sweep_kernel(
    LEFT, RIGHT, WEIGHT, CHUNK_DECAY, VALID, START, ENTERING, LEAVING, RUN_DECAY, PARTNER, PRODUCT,
    left_batch, left_token, left_head, right_batch, right_token, right_head,
    length, chunks, runs, run_length, batches,
    HEADS: tl.constexpr, RATIO: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, CHUNK: tl.constexpr, REVERSED: tl.constexpr,
    HAS_VALID: tl.constexpr, STARTS: tl.constexpr, LEAVES: tl.constexpr, HAS_PARTNER: tl.constexpr,
):  # fmt: skip
    """Eq. (1) over one run of some heads of a group in one direction, a block of N and P: `edge_states` and
    `carry` of `torch_engine.states`. REVERSED is the index of the direction that goes from right to left.

    Columns are BLOCK_P of P for each of BLOCK_H heads, side by side: what heads share is loaded once. A sweep
    that STARTS from given states stores what every chunk receives, another starts from nothing; one that
    LEAVES stores what its run does.
    """
    group = tl.program_id(0) % (HEADS // RATIO)
    first = tl.program_id(0) // (HEADS // RATIO) % tl.cdiv(RATIO, BLOCK_H) * BLOCK_H  # head of the group
    run = tl.program_id(0) // (HEADS // RATIO * tl.cdiv(RATIO, BLOCK_H))
    columns_p = tl.program_id(1) % tl.cdiv(P, BLOCK_P) * BLOCK_P
    columns_n = tl.program_id(1) // tl.cdiv(P, BLOCK_P) * BLOCK_N + tl.arange(0, BLOCK_N)
    direction = tl.program_id(2) // batches
    batch = tl.cast(tl.program_id(2) % batches, tl.int64)
    line = tl.cast(tl.program_id(2), tl.int64)  # of all directions' rows
    column = tl.arange(0, BLOCK_H * BLOCK_P)
    member = first + column // BLOCK_P
    head = group * RATIO + member
    place = columns_p + column % BLOCK_P
    tile = (head[None, :] * N + columns_n[:, None]) * P + place[None, :]
    inside = (columns_n < N)[:, None] & ((place < P) & (member < RATIO))[None, :]
    members = first + tl.arange(0, BLOCK_H)
    shared = (members < RATIO)[None, :, None]
    weights = ((group * RATIO + members) * CHUNK)[None, :, None] + tl.arange(0, CHUNK)[:, None, None]
    columns_p = (columns_p + tl.arange(0, BLOCK_P))[None, None, :]
    left = head_of(LEFT, batch, left_batch, group, left_head)
    right = head_of(RIGHT, batch, right_batch, group, right_head)
    at_run = (line * runs + run) * HEADS
    state = tl.zeros([BLOCK_N, BLOCK_H * BLOCK_P], tl.float32)
    if STARTS:
        state = tl.load(START + at_run * (N * P) + tile, mask=inside, other=0.0)
    run_decay = tl.full([BLOCK_H * BLOCK_P], 1.0, tl.float32)
    count = tl.minimum(run_length, chunks - run * run_length)
    onwards = tl.where(direction == REVERSED, -1, 1)
    chunk = run * run_length + tl.where(direction == REVERSED, count - 1, 0)
    decay = tl.load(CHUNK_DECAY + (line * chunks + chunk) * HEADS + head, mask=member < RATIO, other=0.0)
    for _ in range(0, count):
        at_chunk = (line * chunks + chunk) * HEADS
        following = tl.minimum(tl.maximum(chunk + onwards, 0), chunks - 1)  # a step ahead: a state waits
        next_decay = tl.load(
            CHUNK_DECAY + (line * chunks + following) * HEADS + head, mask=member < RATIO, other=0.0
        )
        if STARTS:
            entering = ENTERING + at_chunk * (N * P) + tile
            tl.store(entering, state.to(ENTERING.dtype.element_ty), mask=inside)
            if HAS_PARTNER:
                partner = tl.load(PARTNER + at_chunk * (N * P) + tile, mask=inside, other=0.0)
                product = tl.sum(state * partner.to(tl.float32), 0).reshape(BLOCK_H, BLOCK_P)
                where = (at_chunk + group * RATIO + members) * tl.num_programs(1) + tl.program_id(1)
                tl.store(PRODUCT + where, tl.sum(product, 1), mask=members < RATIO)
        run_decay *= decay
        rows, valid = token_rows(VALID, batch, chunk * CHUNK, length, CHUNK, HAS_VALID)
        # The weights come first: their product takes the layout of what is loaded last, whole rows of P.
        weight = tl.load(WEIGHT + at_chunk * CHUNK + weights, mask=shared, other=0.0)
        left_tile = load_tile(left, rows, left_token, columns_n, valid, N)
        where = valid[:, None, None] & (columns_p < P)
        right_tile = tl.load(right + rows[:, None, None] * right_token + columns_p, mask=where, other=0.0)
        weighed = (weight * right_tile.to(tl.float32)).to(right_tile.dtype)
        weighed = weighed.reshape(CHUNK, BLOCK_H * BLOCK_P)
        state = add_product(tl.trans(left_tile), weighed, state * decay[None, :])
        decay = next_decay
        chunk += onwards
    if LEAVES:
        tl.store(LEAVING + at_run * (N * P) + tile, state, mask=inside)
    if not STARTS and tl.program_id(1) == 0:
        tl.store(RUN_DECAY + at_run + head, run_decay, mask=(member < RATIO) & (place == 0))


@triton.jit(do_not_specialize=["runs"])
def link_kernel(
    START, STATES, CHUNK_DECAY, FINAL, runs,
    HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSED: tl.constexpr,
    HAS_START: tl.constexpr,
):  # fmt: skip
    """Replace what each run adds, in STATES, by the state that enters it: `carry` of `torch_engine.states`,
    over runs. Only the first direction has a START."""
    row = tl.cast(tl.program_id(0), tl.int64)  # of a row of the batch and a head
    direction = tl.program_id(2)
    line = direction * tl.cast(tl.num_programs(0), tl.int64) + row
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < SIZE
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_START and direction == 0:
        state = tl.load(START + row * SIZE + place, mask=inside, other=0.0)
    for step in tl.range(0, runs, num_stages=4):
        run = tl.where(direction == REVERSED, runs - 1 - step, step)
        at_run = (line // HEADS * runs + run) * HEADS + line % HEADS
        where = STATES + at_run * SIZE + place
        added = tl.load(where, mask=inside, other=0.0)
        tl.store(where, state, mask=inside)
        state = state * tl.load(CHUNK_DECAY + at_run) + added
    tl.store(FINAL + line * SIZE + place, state, mask=inside)


@triton.jit
def enter_kernel(
    STATES, ENTERING, PASSED, chunks, HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """Add to the state of one chunk and head what the chunks before it leave of one that enters them all."""
    at = tl.cast(tl.program_id(0), tl.int64)  # of a row, a chunk and a head
    passed = tl.load(PASSED + at)
    if passed != 0.0:
        place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        row = at // (chunks * HEADS) * HEADS + at % HEADS  # of a row and a head
        entering = tl.load(ENTERING + row * SIZE + place, mask=place < SIZE, other=0.0)
        where = STATES + at * SIZE + place
        state = tl.load(where, mask=place < SIZE, other=0.0).to(tl.float32) + passed * entering
        tl.store(where, state.to(STATES.dtype.element_ty), mask=place < SIZE)


def sweep_states(
    left: Tensor,
    right: Tensor,
    weight: Tensor,
    chunk_decay: Tensor,
    valid: Tensor | None,
    start: Tensor | None,
    *,
    reverse: bool = False,
    partner: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Eq. (1) over all chunks, in one direction or both.

    Args:
        left: (B, L, H or G, N); right: (B, L, H or G, P), in one dtype.
        weight: (directions, B, K, H, C) float32; chunk_decay: (directions, B, K, H) float32.
        valid: (B, L) bytes; None = all.
        start: (B, H, N, P) float32, of the first direction; zeros if None.
        reverse: the first direction goes from the last chunk to the first; if not, the second does.
        partner: (directions, B, K, H, N, P), states to multiply with.
    Returns:
        (directions, B, K, H, N, P) in the dtype of `left`, what each chunk receives; (directions, B, H, N, P)
        float32, what the last one leaves; and (directions, B, K, H), the inner product of what each chunk
        receives with its partner.
    """
    directions, batch, chunks, heads, _ = weight.shape
    sizes = (left.shape[-1], right.shape[-1])
    ratio = heads // left.shape[2]
    blocks = sweep_blocks(*sizes, ratio, left.dtype, partner is not None)
    sweep = Sweep(rows_of(left), rows_of(right), weight, chunk_decay, valid, blocks, 0 if reverse else 1)
    run = run_length(chunks, math.prod(sweep.grid(1)), ratio > 1)
    runs = ceil_div(chunks, run)
    entering = left.new_empty(directions, batch, chunks, heads, *sizes)
    final = left.new_empty(directions, batch, heads, *sizes, dtype=torch.float32)
    if runs == 1:
        states = torch.zeros_like(final)
        if start is not None:
            states[0] = start
        product = sweep.launch(run, start=states, entering=entering, leaving=final, partner=partner)
        return entering, final, product
    states = left.new_empty(directions, batch, runs, heads, *sizes, dtype=torch.float32)
    run_decay = chunk_decay.new_empty(directions, batch, runs, heads)
    sweep.launch(run, leaving=states, run_decay=run_decay)
    link_runs(states, run_decay, start, final, sweep.reversed)
    return entering, final, sweep.launch(run, start=states, entering=entering, partner=partner)


@dataclass(frozen=True)
class Sweep:
    """The arguments that all sweeps of a call share."""

    left: Tensor
    right: Tensor
    weight: Tensor
    chunk_decay: Tensor
    valid: Tensor | None
    blocks: tuple[int, int, int]  # `sweep_blocks`
    reversed: int  # index of the direction that goes from the last chunk to the first

    def grid(self, runs: int) -> tuple[int, int, int]:
        """Programs: groups, blocks of their heads and runs; blocks of N and P; rows of all directions."""
        directions, batch, _, heads, _ = self.weight.shape
        groups, block_n, block_h, block_p = self.left.shape[2], *self.blocks
        block_count = ceil_div(self.left.shape[3], block_n) * ceil_div(self.right.shape[3], block_p)
        return groups * ceil_div(heads // groups, block_h) * runs, block_count, batch * directions

    def launch(
        self,
        run: int,
        *,
        start: Tensor | None = None,
        entering: Tensor | None = None,
        leaving: Tensor | None = None,
        run_decay: Tensor | None = None,
        partner: Tensor | None = None,
    ) -> Tensor | None:
        """Run `sweep_kernel`, `run` chunks a program; returns the inner products with `partner`, (directions,
        B, K, H)."""
        directions, batch, chunks, heads, chunk = self.weight.shape
        runs, (block_n, block_h, block_p) = ceil_div(chunks, run), self.blocks
        grid, product = self.grid(runs), None
        if partner is not None:
            product = self.weight.new_empty(directions, batch, chunks, heads, grid[1])
        sweep_kernel[grid](
            self.left,
            self.right,
            self.weight,
            self.chunk_decay,
            self.valid,
            start,
            entering,
            leaving,
            run_decay,
            partner,
            product,
            **stride_arguments(left=self.left, right=self.right),
            length=self.left.shape[1],
            chunks=chunks,
            runs=runs,
            run_length=run,
            batches=batch,
            HEADS=heads,
            RATIO=heads // self.left.shape[2],
            N=self.left.shape[3],
            P=self.right.shape[3],
            BLOCK_N=block_n,
            BLOCK_H=block_h,
            BLOCK_P=block_p,
            CHUNK=chunk,
            REVERSED=self.reversed,
            HAS_VALID=self.valid is not None,
            STARTS=start is not None,
            LEAVES=leaving is not None,
            HAS_PARTNER=partner is not None,
            num_warps=warps(block_n, block_h * block_p),
            num_stages=3 if shared_memory(self.left) >= STAGED_MEMORY else 1,
        )
        return None if product is None else product.sum(-1)


def run_length(chunks: int, programs: int, shared: bool) -> int:
    """Chunks per run, for so many programs a run: all, if they fill a GPU; else a power of two, as long as
    enough programs are left."""
    if programs >= (ENOUGH if shared else PROGRAMS):
        return chunks
    run = RUN
    while run > 1 and ceil_div(chunks, run) * programs < PROGRAMS:
        run //= 2
    return run


def sweep_blocks(
    state: int, head_dim: int, ratio: int, kind: torch.dtype, partnered: bool
) -> tuple[int, int, int]:
    """How much of N, how many heads of a group and how much of P of each a sweep carries at once: less of P
    where a partner takes registers too."""
    width = BLOCKS[kind]
    if ratio == 1:
        block = min(WHOLE_N, tile_size(state)), 1, min(tile_size(head_dim), width)
        return (*block[:2], max(16, block[2] // 2)) if partnered else block
    heads = min(power_of_2(ratio), max(1, width // NARROWEST))
    return min(BLOCK_N[kind], tile_size(state)), heads, min(tile_size(head_dim), width // heads)


def link_runs(states: Tensor, run_decay: Tensor, start: Tensor | None, final: Tensor, reversed: int) -> None:
    """`link_kernel` over (directions, B, R, H, N, P) `states`, overwritten; `final` receives the rest."""
    directions, batch, runs, heads = run_decay.shape
    size = states.shape[-2] * states.shape[-1]
    block = min(power_of_2(size), LINKED)
    start = None if start is None else start.to(torch.float32).contiguous()
    link_kernel[(batch * heads, ceil_div(size, block), directions)](
        start,
        states,
        run_decay,
        final,
        runs,
        HEADS=heads,
        SIZE=size,
        BLOCK=block,
        REVERSED=reversed,
        HAS_START=start is not None,
    )


def enter_states(states: Tensor, chunk_decay: Tensor, entering: Tensor, *, reverse: bool) -> None:
    """`enter_kernel` over the states (B, K, H, N, P) that chunks receive, overwritten.

    Args:
        states: as a sweep from zero leaves them.
        chunk_decay: (B, K, H) float32.
        entering: (B, H, N, P), the state before the first chunk; `reverse`: behind the last.
    """
    batch, chunks, heads = chunk_decay.shape
    size = states.shape[-2] * states.shape[-1]
    decay = chunk_decay.mT.flip(-1) if reverse else chunk_decay.mT  # (B, H, K), as a chunk comes
    passed = F.pad(decay[..., :-1], (1, 0), value=1.0).cumprod(-1)
    passed = passed.flip(-1) if reverse else passed
    block = min(power_of_2(size), ENTERED)
    enter_kernel[(batch * chunks * heads, ceil_div(size, block))](
        states,
        entering.to(torch.float32).contiguous(),
        passed.mT.contiguous(),
        chunks,
        HEADS=heads,
        SIZE=size,
        BLOCK=block,
        num_warps=8 if block == ENTERED else 4,
    )
