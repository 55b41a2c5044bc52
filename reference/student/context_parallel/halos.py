"""Convolution and text window of a split prompt: each rank gets the last tokens before its slice, its halo.

A halo may reach over several ranks, and padding does not count. So every rank sends all others its last K-1
or W-1 valid tokens, its *tail*. The last tokens of the tails before a slice are its halo; the last of all
tails are the state after the prompt.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ...numerics import (
    accumulation_dtype,
    last_where,
    without_autocast,
    zero_where_masked,
)
from ...sliding_window_attention import WindowState
from .packed_rows import Samples
from .ranks import ContextParallel


@without_autocast
def causal_conv(
    parallel: ContextParallel, u, weight, bias=None, *, mask=None, initial_state=None, sequence=None
):
    """`causal_conv` of this rank's u (B, n, channels) with the prompt's mask and sequence (B, L).

    Returns:
        This rank's output, and the state after the whole prompt.
    """
    taps, dtype = weight.shape[1], accumulation_dtype(u.dtype)
    mine, ends = None if mask is None else parallel.local(mask), initial_state
    if taps > 1:
        there = initial_state is not None
        samples, before = parallel.samples(sequence, mask), [initial_state]
        mine_before, after = pass_tails(parallel, [u.to(dtype)], mask, taps - 1, before, there, samples)
        ((initial_state,), _), ((ends,), _) = mine_before, after
    given = {"mask": mine, "initial_state": initial_state, "sequence": parallel.local_or_none(sequence)}
    out, end = parallel.operators.causal_conv(u, weight, bias, **given)
    return out, end if taps == 1 else ends


@without_autocast
def sliding_window_attention(
    parallel: ContextParallel,
    q,
    k,
    v,
    window,
    *,
    asks=None,
    valid=None,
    initial_state=None,
    sequence=None,
    **given,
):
    """`sliding_window_attention` of this rank's q, k, v with the prompt's asks, valid, sequence (B, L).

    Returns:
        This rank's output, and the state after the whole prompt.
    """
    asks, mine = (None if mask is None else parallel.local(mask) for mask in (asks, valid))
    before = (None, None) if initial_state is None else (initial_state.k, initial_state.v)
    there = False if initial_state is None else initial_state.present
    if window > 1:
        samples = parallel.samples(sequence, valid)
        states = pass_tails(parallel, [k, v], valid, window - 1, before, there, samples)
        initial_state, after = (WindowState(*kept, present) for kept, present in states)
    o, end = parallel.operators.sliding_window_attention(
        q,
        k,
        v,
        window,
        asks=asks,
        valid=mine,
        initial_state=initial_state,
        sequence=parallel.local_or_none(sequence),
        **given,
    )
    return o, after if window > 1 else end


def pass_tails(
    parallel: ContextParallel, tensors, valid, size, before, present, samples: Samples | None = None
):
    """The last `size` valid tokens before this rank, and those after the prompt; of packed rows, those of
    the sample that goes on.

    Args:
        tensors: this rank's, (B, n, ...) each.
        valid: (B, L) bool, of the prompt; None = all.
        size: at least 1.
        before: what stood before the prompt, (B, size, ...) each, or None.
        present: which of it there is, (B, size) bool, or one bool for all.
        samples: of packed rows; None = a row is one sample.
    Returns:
        twice: (B, size, ...) of each tensor, oldest first, and (B, size) bool, which of them there are.
    """
    valid = valid if samples is None else samples.valid
    place, found = parallel.once(("tail", size), lambda: find_tail(parallel, valid, size, len(tensors[0])))
    rows = torch.arange(len(place), device=place.device)[:, None]
    tails = [
        zero_where_masked(t[rows, place], found.view(*found.shape, *(1,) * (t.ndim - 2))) for t in tensors
    ]
    return pass_found_tails(parallel, tails, valid, before, present, samples)


def find_tail(
    parallel: ContextParallel, valid: Tensor | None, size: int, batch: int
) -> tuple[Tensor, Tensor]:
    """Where this rank's last `size` valid tokens stand in its slice, (B, size), and which there are."""
    length, device = parallel.lengths[parallel.rank], parallel.counts.device
    place = torch.arange(-size, length, device=device).expand(batch, -1)
    mine = place >= 0 if valid is None else F.pad(parallel.local(valid), (size, 0))
    (place,), found = last_where(mine, size, place)
    return place, found


def pass_found_tails(
    parallel: ContextParallel, tails, valid, before, present, samples: Samples | None = None
):
    """`pass_tails`, given this rank's tails, (B, size, ...) each, from where `find_tail` says."""
    batch, size, device = *tails[0].shape[:2], tails[0].device
    nothing = [torch.zeros_like(tail) for tail in tails]
    if valid is None:
        counts = parallel.counts.expand(batch, -1)
    else:
        counts = torch.stack([part.sum(1) for part in valid.split(parallel.lengths, 1)], 1)  # (B, R)
    there = torch.arange(size, device=device) >= size - counts[..., None]  # (B, R, size)
    if not isinstance(present, Tensor):
        present = torch.full((batch, size), present, device=device)
    there = torch.cat([present, there.flatten(1)], 1)  # (B, (R + 1)·size)
    before = [n if b is None else b.to(n.dtype) for n, b in zip(nothing, before, strict=True)]
    # All of it goes into both states: so on every rank the collectives of backward pair up.
    every = parallel.all_gather(torch.cat([tail.flatten(2) for tail in tails], 2)).movedim(0, 1).flatten(1, 2)
    every = every.split([math.prod(tail.shape[2:]) for tail in tails], 2)
    history = [torch.cat([b, own.unflatten(2, b.shape[2:])], 1) for b, own in zip(before, every, strict=True)]
    column = torch.arange(there.shape[1], device=device)
    mine, after = there & (column < (parallel.rank + 1) * size), there
    if samples is not None:
        parts = [slice(*pair) for pair in pairwise(parallel.edges)]
        ids, kept = ([F.pad(each[:, part], (size, 0)) for part in parts] for each in (samples.ids, valid))
        ids = [last_where(k, size, i)[0][0] for i, k in zip(ids, kept, strict=True)]
        ids = torch.cat([ids[0].new_zeros(batch, size), *ids], 1)  # of `history`; none stood before
        mine = mine & (ids == samples.first(parallel.slice))
        after = after & (ids == samples.open[-1][:, None])
    return last_where(mine, size, *history), last_where(after, size, *history)
