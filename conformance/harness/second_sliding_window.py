"""Sliding-window attention a second time: a list of what each row has seen, and attention under its mask.

Letters: B batch, L tokens, W window, S keys of the state, H heads, G groups, N and P head dims.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from linmu.reference import WindowState

from .compare import Results, cotangent
from .second_formulation import heads_of

Mask = tuple[tuple[int, ...], ...]


def pairs_and_rest(
    window: int,
    length: int,
    batch: int,
    asks: Tensor | None = None,
    valid: Tensor | None = None,
    sequence: Tensor | None = None,
    present: Tensor | None = None,
) -> tuple[Tensor, list[list[int]]]:
    """(B, L, S + L) bool, which key a token reads; and for each row the places that are left at its end."""
    masks = (
        None if mask is None else tuple(map(tuple, mask.tolist()))
        for mask in (asks, valid, sequence, present)
    )
    return pairs_and_rest_of_lists(window, length, batch, *masks)


@lru_cache(maxsize=8)  # a case asks again and again
def pairs_and_rest_of_lists(
    window: int,
    length: int,
    batch: int,
    asks: Mask | None,
    valid: Mask | None,
    sequence: Mask | None,
    present: Mask | None,
) -> tuple[Tensor, list[list[int]]]:
    """The same, of masks as tuples of rows."""
    before = 0 if present is None else len(present[0])
    seen = torch.zeros(batch, length, before + length, dtype=torch.bool)
    left = []
    for row in range(batch):
        history = [] if present is None else [place for place, there in enumerate(present[row]) if there]
        current = None
        for t in range(length):
            if valid is not None and not valid[row][t]:
                continue
            number = 0 if sequence is None else sequence[row][t]
            if current not in (None, number):
                history = []
            current = number
            history.append(before + t)
            history = history[-window:]
            if asks is None or asks[row][t]:
                seen[row, t, history] = True
        left.append(history[len(history) - min(len(history), window - 1) :])
    return seen, left


def sliding_window_attention(
    q, k, v, window, *, asks=None, valid=None, sequence=None, initial_state=None, scale=None
) -> tuple[Tensor, WindowState]:
    """`scaled_dot_product_attention` over the state and the whole row, under a mask from lists."""
    batch, length, heads, _ = q.shape
    present = None if initial_state is None else initial_state.present
    seen, left = pairs_and_rest(window, length, batch, asks, valid, sequence, present)
    if initial_state is not None:
        k, v = torch.cat([initial_state.k, k], dim=1), torch.cat([initial_state.v, v], dim=1)
    reads = seen.any(-1)
    allowed = seen.clone()
    allowed[..., 0] |= ~reads  # a row of the softmax must not be empty
    args = (tensor.transpose(1, 2) for tensor in (q, heads_of(k, heads), heads_of(v, heads)))
    o = F.scaled_dot_product_attention(*args, attn_mask=allowed[:, None], scale=scale).transpose(1, 2)
    return o * reads[..., None, None], rest(k, v, left, window - 1)


def rest(k: Tensor, v: Tensor, left: Iterable[list[int]], size: int) -> WindowState:
    """The state after a row, from the places that are left of it."""
    rows = [(k[row, places], v[row, places]) for row, places in enumerate(left)]
    padded = [[F.pad(t, (0, 0, 0, 0, size - len(t), 0)) for t in pair] for pair in rows]
    present = [torch.arange(size) >= size - len(pair[0]) for pair in rows]
    keys, values = zip(*padded, strict=True)
    return WindowState(torch.stack(keys), torch.stack(values), torch.stack(present))


def sizes_in_window(q, k, v, window, *, scale=None, initial_k=None, initial_v=None, **masks) -> Results:
    """The sums of the absolute terms of the gradients of queries and keys, which are differences:
    p (|ō·v| + |ō·o|) · scale · |k| or |q|. The arguments are a case's, in float64.
    """
    (batch, length, heads, size), groups = q.shape, k.shape[2]
    seen, _ = pairs_and_rest(window, length, batch, **masks)
    before = seen.shape[2] - length
    if before:
        k, v = torch.cat([initial_k, k], dim=1), torch.cat([initial_v, v], dim=1)
    scale = size**-0.5 if scale is None else scale
    keys, values = heads_of(k, heads), heads_of(v, heads)
    scores = scale * torch.einsum("bthn,bjhn->bhtj", q, keys)
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0)
    o = torch.einsum("bhtj,bjhp->bthp", weights, values)
    o_grad = cotangent(o, 0)
    through = torch.einsum("bthp,bjhp->bhtj", o_grad, values).abs()
    terms = scale * weights * (through + (o_grad * o).sum(-1).abs().transpose(1, 2)[..., None])
    of_keys = torch.einsum("bhtj,bthn->bjhn", terms, q.abs())
    of_keys = of_keys.unflatten(2, (groups, -1)).sum(3)  # (B, S + L, G, N)
    sizes = {"grad q": torch.einsum("bhtj,bjhn->bthn", terms, keys.abs())}
    sizes |= {"grad k": of_keys[:, before:], "grad initial_k": of_keys[:, :before]}
    return sizes
