"""The bidirectional scan of a split prompt: every rank scans from zero, then adds what enters.

Forward, S(r) being the state (N, P) that enters rank r, E(r) the one it ends with from zero, sums over its
tokens, and y0 the output of its own scan:

    S(r+1) = exp(A Σ dt) S(r) + E(r)                                                                      (1)
    y_t = y0_t + w_t exp(A Σ_{s <= t} dt_s) S(r)ᵀ C_t,  w_t the gate on vision, 1 on text                 (2)

So a rank hands on two things, E and the decay exp(A Σ dt), at once and to all: no rank waits for a chain.
Choice: (2), not a second scan from S(r): one product with C, as the scan is linear in its state.

In reverse the same holds from right to left, within the one segment that an edge between ranks can cut. There
E is the sum of what that segment's tokens on this rank write, which the local scan does not return.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...numerics import (
    accumulation_dtype,
    without_autocast,
    zero_where_masked,
)
from .ranks import ContextParallel, wait


@without_autocast
def bidirectional_scan(
    parallel: ContextParallel,
    x,
    dt,
    A,
    B,
    C,
    *,
    gate,
    segment=None,
    valid=None,
    D=None,
    initial_state=None,
    sequence=None,
):
    """`bidirectional_scan` of this rank's tokens in scan order; segment, valid and sequence (B, L) of the
    prompt.

    Returns:
        This rank's y (B, n, H, P), and the state after the whole prompt.
    """
    dtype = accumulation_dtype(x.dtype)
    mine, own = (None if each is None else parallel.local(each) for each in (valid, segment))
    samples = parallel.samples(sequence, valid)
    given = {"gate": gate, "segment": own, "valid": mine, "D": D}
    given["sequence"] = parallel.local_or_none(sequence)
    y, end = parallel.operators.bidirectional_scan(x, dt, A, B, C, **given)
    steps = dt.to(dtype)  # (B, n, H)
    if mine is not None:
        steps = zero_where_masked(steps, mine[..., None])
        x, B, C = (zero_where_masked(t, mine[..., None, None]) for t in (x, B, C))
    A, gate = A.to(dtype), gate.to(dtype)
    # With gradients every rank computes all of it, so that the collectives of backward pair up. Without,
    # what is 0 is left out, and products are those of the tensors' dtype, as within the scan.
    needs_grad = torch.is_grad_enabled()
    y = y.to(dtype if needs_grad else x.dtype)
    start = torch.zeros_like(end) if initial_state is None else initial_state.to(dtype)
    decay = torch.exp(A * steps.sum(1))
    if samples is not None:
        decay = decay * samples.passes[parallel.rank][:, None]
    forward = states_at_edges(parallel, end, decay, start)
    if needs_grad or parallel.rank > 0 or initial_state is not None:
        weight = torch.exp(A * cumulative(steps))  # (B, n, H), of what entered
        if own is not None:
            weight = weight * torch.where(own[..., None] >= 0, gate, 1)
        if samples is not None:
            goes_on = parallel.local(samples.ids) == samples.open[parallel.rank][:, None]
            weight = zero_where_masked(weight, goes_on[..., None])
        y = add_reads(y, weight, C, forward[parallel.rank])
    if own is not None:
        cut, is_cut = parallel.once("cuts", lambda: find_cuts(parallel, segment))
        if is_cut:
            y = add_reverse(parallel, y, x, steps, A, B, C, gate, own, cut)
    return y.to(x.dtype), forward[-1]


def add_reverse(parallel: ContextParallel, y, x, steps, A, B, C, gate, segment, cut) -> Tensor:
    """Add to y what this rank's tokens read of the reverse states that enter from the right.

    Args:
        y, x, steps, A, B, C, gate: as in the scan; tensors of this rank, `steps` dt or 0 where not valid.
        segment: (B, n), this rank's.
        cut: of each edge, (B,): the segment that it cuts, -1 = none.
    """
    rank, needs_grad = parallel.rank, torch.is_grad_enabled()
    in_left, in_right = ((segment == cut[e][:, None]) & (segment >= 0) for e in (rank, rank + 1))
    left = zero_where_masked(steps, in_left[..., None])  # of the segment that goes on before this rank
    state = C.new_zeros(len(C), *C.shape[2:], x.shape[3], dtype=steps.dtype)
    if needs_grad or rank > 0:
        write = torch.exp(A * (cumulative(left) - left)) * left
        state = recomputed(state_of, x, B, write.to(y.dtype)).to(steps.dtype)
    through = [(a == b) & (a >= 0) for a, b in pairwise(cut)]  # the rank lies inside one segment
    decay = torch.exp(A * left.sum(1))
    entering = states_at_edges(parallel, state, decay, torch.zeros_like(state), through)
    if needs_grad or rank + 1 < parallel.ranks:
        right = zero_where_masked(steps, in_right[..., None])
        weight = torch.exp(A * cumulative(right.flip(1)).flip(1)) * (1 - gate)
        y = add_reads(y, zero_where_masked(weight, in_right[..., None]), C, entering[rank + 1])
    return y


def send_states(parallel: ContextParallel, added: Tensor, decay: Tensor) -> Tensor:
    """Start the exchange that `receive_states` waits for."""
    mine, ones = torch.cat([added.flatten(), decay.flatten()]), [1] * parallel.ranks
    return parallel.start_all_to_all(mine.expand(parallel.ranks, -1), ones, ones)


def receive_states(
    parallel: ContextParallel, added: Tensor, decay: Tensor, start: Tensor | None, arriving: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Eq. (1) of both directions in one exchange, without gradients.

    Args:
        added: (directions, B, H, N, P), what this rank adds from zero to the states.
        decay: (directions, B, H), by what it multiplies those that enter.
        start: (B, H, N, P), the forward state before the prompt; None = zeros.
        arriving: what `send_states` gave.
    Returns:
        the states at the edges, (R + 1, B, H, N, P): forward ones, and reverse ones if there are such.
    """
    every = wait(arriving).split([added.numel(), decay.numel()], 1)
    states, decays = every[0].view(-1, *added.shape), every[1].view(-1, *decay.shape)
    edges = []
    for direction, order in enumerate((range(parallel.ranks), reversed(range(parallel.ranks)))[: len(added)]):
        state = torch.zeros_like(added[0])
        found = [state if start is None or direction else start.to(added.dtype)]
        for rank in order:
            factor = decays[rank, direction][..., None, None]
            found.append(torch.addcmul(states[rank, direction], factor, found[-1]))
        edges.append(torch.stack(found[::-1] if direction else found))
    return edges[0], edges[1] if len(edges) > 1 else None


def states_at_edges(
    parallel: ContextParallel,
    state: Tensor,
    decay: Tensor,
    start: Tensor,
    through: list[Tensor] | None = None,
) -> Tensor:
    """Eq. (1): the state at each edge, (R + 1, B, H, N, P); from right to left if `through` is given.

    Args:
        state: (B, H, N, P), what this rank adds from zero.
        decay: (B, H), by what it multiplies the state that enters.
        start: (B, H, N, P), the state at the first edge, or at the last.
        through: of each rank, (B,) bool: may a state pass from its right edge to its left?
    """
    both = parallel.all_gather(torch.cat([state.flatten(1), decay], 1)).split(
        [state[0].numel(), decay.shape[1]], 2
    )
    states, decays = both[0].unflatten(2, state.shape[1:]), both[1]
    edges, ranks = [start], range(parallel.ranks)
    for rank in ranks if through is None else reversed(ranks):
        factor = decays[rank][..., None, None]
        enters = edges[-1]
        if through is not None:
            enters = zero_where_masked(enters, through[rank][:, None, None, None])
        edges.append(factor * enters + states[rank])
    # Stacked, so that on every rank every state has a gradient and the collectives of backward pair up.
    return torch.stack(edges if through is None else edges[::-1])


def find_cuts(parallel: ContextParallel, segment: Tensor) -> tuple[list[Tensor], bool]:
    """The segment that each edge cuts, (B,) each, -1 = none; and whether any does."""
    cut = [segment_across(segment, edge) for edge in parallel.edges]
    return cut, bool((torch.stack(cut) >= 0).any())


def cumulative(steps: Tensor) -> Tensor:
    """Sums of steps (B, n, H) up to each token. Tokens come last: a GPU sums columns one by one."""
    return steps.mT.contiguous().cumsum(-1).mT


def add_reads(y: Tensor, weight: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """y (B, n, H, P) + weight (B, n, H) · what C (B, n, H, N) reads of a state (B, H, N, P), in y's dtype."""
    weight, state = weight.to(y.dtype)[..., None], state.to(y.dtype)
    if torch.is_grad_enabled():
        return y + recomputed(lambda weight, C, state: weight * read_state(C, state), weight, C, state)
    return torch.addcmul(y, weight, read_state(C, state))


def read_state(C: Tensor, state: Tensor) -> Tensor:
    """C (B, n, H, N) and a state (B, H, N, P) -> (B, n, H, P)."""
    return torch.einsum("blhn,bhnp->blhp", C.to(state.dtype), state)


def state_of(x: Tensor, B: Tensor, write: Tensor) -> Tensor:
    """The state (B, H, N, P) that x (B, n, G, P) and B (B, n, G, N) write, weighted by `write`, (B, n, H)."""
    shares = write.unflatten(2, (x.shape[2], -1))[..., None]  # (B, n, G, H/G, 1)
    parts = x.to(write.dtype)[:, :, :, None] * shares
    return torch.einsum("blgn,blgrp->bgrnp", B.to(write.dtype), parts).flatten(1, 2)


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function(*arguments)`, computed again in backward: copies of all tokens in float32 would be a third of
    a layer's memory.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def segment_across(segment: Tensor, edge: int) -> Tensor:
    """(B,): the id of the segment (B, L) that has tokens on both sides of `edge`, -1 where there is none."""
    before, after = segment[:, :edge], segment[:, edge:]
    none = segment.new_full((len(segment),), -1)
    if not before.shape[1] or not after.shape[1]:
        return none
    left = before.flip(1).gather(1, (before.flip(1) >= 0).int().argmax(1, keepdim=True))[:, 0]
    right = after.gather(1, (after >= 0).int().argmax(1, keepdim=True))[:, 0]
    return torch.where(left == right, left, none)
