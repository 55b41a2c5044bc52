"""Causal softmax attention inside a sliding window of each row, one token at a time.

Letters: B batch, L tokens, W window, H query heads, G groups, N head dim of q and k, P head dim of v. Head h
reads group h // (H/G).

    o_t = Σ_j softmax_j(scale · q_t·k_j) v_j      over the last W valid tokens j ≤ t of t's sequence      (1)

The text half of Local-Swin. Choice: the digests of LinMU (arXiv 2601.01322) do not say how text reads what is
near; a causal window is what language models with linear attention keep of softmax. Cost: L steps of a few
torch calls on at most W keys each, or more where padding lies between them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import (
    require,
    require_float,
    require_groups,
    require_int64,
    require_mask,
    require_one_device,
    require_shape,
)
from .numerics import accumulation_dtype, last_where, without_autocast, zero_where_masked


class WindowState(NamedTuple):
    """What later tokens still see of the tokens before them: the last W - 1 valid ones, oldest first.

    Args:
        k: (B, W-1, G, N), in the dtype of the keys.
        v: (B, W-1, G, P), in the dtype of the values.
        present: (B, W-1) bool, True = there is such a token. What is missing comes first and holds zeros.
    """

    k: Tensor
    v: Tensor
    present: Tensor


class DonatedWindowState(WindowState):
    """A state the callee may overwrite in place; the caller must use the returned state."""

    __slots__ = ()


@without_autocast
def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    asks: Tensor | None = None,
    valid: Tensor | None = None,
    sequence: Tensor | None = None,
    initial_state: WindowState | None = None,
    scale: float | None = None,
) -> tuple[Tensor, WindowState]:
    """Attend to the last `window` valid tokens of the row, the token itself included; eq. (1).

    Choice: a state belongs to the sequence of the row's first valid token, and what is left of the row's last
    sequence is the state after it. Whoever cuts a row where a sequence ends goes on without a state.

    Args:
        q: (B, L, H, N), any float dtype.
        k: (B, L, G, N).
        v: (B, L, G, P).
        window: W, in tokens, at least 1.
        asks: (B, L) bool, True = the token has an output; the others are read all the same. None = all.
        valid: (B, L) bool, True = takes part; other tokens are skipped as if absent. None = all.
        sequence: (B, L) int64, which sample of a packed row a token belongs to; the tokens of one follow each
            other, and nothing is read across. The ids of invalid tokens say nothing. None = one a row.
        initial_state: the tokens before these; None = there were none.
        scale: factor on q·k; None = N**-0.5.
    Returns:
        o: (B, L, H, P) in the dtype of `q`; 0 where a token does not ask or is not valid. Softmax and sums
            run in float32, or float64 if `q` is.
        state: what the tokens after these see of them.
    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, L = 0 or a window below 1.
    """
    check_sliding_window("sliding_window_attention", q, k, v, window, asks, valid, sequence, initial_state)
    must = "a text window must be computed by linmu.optimized"
    hint = "convert with backend='optimized', or with text_window 0"
    require(not torch.compiler.is_exporting(), "torch.export", must, "linmu.reference's loop", hint)
    dtype, length = q.dtype, q.shape[1]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    everyone = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    valid = everyone if valid is None else valid
    asks = valid if asks is None else asks & valid
    sequence = torch.zeros_like(everyone, dtype=torch.int64) if sequence is None else sequence
    before = nothing_before(k, v, window) if initial_state is None else initial_state

    there = torch.cat([before.present, valid], dim=1)  # (B, W-1 + L): which tokens there are
    keys = torch.cat([before.k.to(k.dtype), k], dim=1)  # (B, W-1 + L, G, N)
    values = torch.cat([before.v.to(v.dtype), v], dim=1)
    keys, values = (zero_where_masked(tensor, there[..., None, None]) for tensor in (keys, values))
    first = sequence.gather(1, valid.int().argmax(1, keepdim=True))  # (B, 1): the state's sequence
    ids = torch.cat([first.expand_as(before.present), sequence], dim=1)
    rank = there.cumsum(1)  # how many tokens there are up to each

    queries = zero_where_masked(q, asks[..., None, None]).to(accumulation_dtype(dtype))
    wide_keys, wide_values = (tensor.to(queries.dtype) for tensor in (keys, values))
    outputs: list[Tensor] = []
    for t in range(length):
        now = slice(window - 1 + t, window + t)
        seen = there & (ids == ids[:, now]) & (rank > rank[:, now] - window)  # W of them at most
        some = seen[:, : now.stop].any(0).nonzero()  # columns that a row sees
        span = slice(int(some[0]) if len(some) else now.start, now.stop)
        outputs.append(attend(queries[:, t], wide_keys[:, span], wide_values[:, span], seen[:, span], scale))
    output = zero_where_masked(torch.stack(outputs, dim=1), asks[..., None, None])  # (B, L, H, P)
    return output.to(dtype), last_tokens(keys, values, there, ids, window)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Eq. (1) for one token: q (B, H, N), k (B, n, G, N), v (B, n, G, P), seen (B, n) -> (B, H, P)."""
    q = q.unflatten(1, (k.shape[2], -1))  # (B, G, H/G, N)
    scores = scale * torch.einsum("bgrn,bjgn->bgrj", q, k)
    lowest = torch.finfo(scores.dtype).min  # finite, so that a row that sees nothing gives no NaN
    scores = torch.where(seen[:, None, None, :], scores, scores.new_full((), lowest))
    return torch.einsum("bgrj,bjgp->bgrp", scores.softmax(-1), v).flatten(1, 2)  # eq. (1)


def nothing_before(k: Tensor, v: Tensor, window: int) -> WindowState:
    """The state before the first token of a row."""
    absent = torch.zeros(k.shape[0], window - 1, dtype=torch.bool, device=k.device)
    start_k, start_v = (t.new_zeros(t.shape[0], window - 1, *t.shape[2:]) for t in (k, v))
    return WindowState(start_k, start_v, absent)


def last_tokens(keys: Tensor, values: Tensor, there: Tensor, ids: Tensor, window: int) -> WindowState:
    """The last W - 1 tokens of each row's last sequence, from all of them, (B, W-1 + L, ...)."""
    place = torch.arange(there.shape[1], device=there.device)
    last = torch.where(there, place, 0).amax(1, keepdim=True)
    of_last = there & (ids == ids.gather(1, last))
    (k, v), present = last_where(of_last, window - 1, keys, values)
    return WindowState(k, v, present)


def check_sliding_window(where: str, q, k, v, window, asks, valid, sequence, initial_state) -> None:
    """Shapes, dtypes and devices of the attention's arguments."""
    require(type(window) is int and window >= 1, where, "window must be an int of at least 1", repr(window))
    require_float(where, q=q, k=k, v=v)
    require_shape(where, "q", q, (None, None, None, None), "B, L, H, N")
    batch, length, heads, size = q.shape
    require(length >= 1, where, "L must be at least 1", length)
    require_shape(where, "k", k, (batch, length, None, size), "B, L, G, N")
    groups = k.shape[2]
    require_groups(where, heads, groups)
    require_shape(where, "v", v, (batch, length, groups, None), "B, L, G, P")
    require_mask(where, "asks", asks, (batch, length), "B, L")
    require_mask(where, "valid", valid, (batch, length), "B, L")
    require_int64(where, "sequence", sequence, (batch, length), "B, L")
    require_one_device(where, q=q, asks=asks, valid=valid, sequence=sequence)
    if initial_state is not None:
        check_window_state(where, initial_state, k, v, window)


def check_window_state(where: str, state, k: Tensor, v: Tensor, window: int) -> None:
    """A state of the window's length, for these keys and values."""
    is_state = isinstance(state, WindowState)
    require(is_state, where, "initial_state must be a WindowState", type(state).__name__)
    (batch, _, groups, size), before = k.shape, window - 1
    require_float(where, k=k, **{"initial_state.k": state.k, "initial_state.v": state.v})
    require_shape(where, "initial_state.k", state.k, (batch, before, groups, size), "B, W-1, G, N")
    require_shape(where, "initial_state.v", state.v, (batch, before, groups, v.shape[3]), "B, W-1, G, P")
    require(state.present is not None, where, "initial_state.present must be a tensor (B, W-1)", None)
    require_mask(where, "initial_state.present", state.present, (batch, before), "B, W-1")
    require_one_device(where, k=k, **{"initial_state.present": state.present})
