"""The torch engine of sliding-window attention: blocks of valid tokens against the keys that they read.

Letters: B batch, L tokens, M keys, W window, H query heads, G groups, N head dim of q and k, P head dim of v;
C tokens a block.

    p_tj = exp(scale q_t·k_j - lse_t)        o_t = Σ_j p_tj v_j                                            (1)
    ḡ_tj = p_tj (ō_t·v_j - ō_t·o_t)        q̄ = scale ḡ k        k̄ = scale ḡᵀ q        v̄ = pᵀ ō          (2)

Padding is left out first. A block of C of the tokens that remain reads R <= C + W - 1 keys, its own and those
before, so that memory and time grow with M, never with its square.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...reference.numerics import accumulation_dtype
from ..decoding.torch_engine import ring_slots
from ..elementwise.operator import RotateInputs
from ..elementwise.torch_engine import rotate
from ..layout.tokens import gather_tokens
from .operator import RingInputs, SlidingGrads, SlidingInputs, SlidingOutputs, StepInputs, StepOutputs

BLOCK = 64  # tokens at most
SLAB_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}  # of the scores of the blocks that are taken at once


@dataclass(frozen=True)
class Blocks:
    """Some neighbouring blocks of all rows, as places of keys.

    Args:
        token: (B, n, C) int64, the tokens that ask; L where none does.
        key: (B, n, R) int64, the W - 1 keys before the block and its own; M where there is none.
        seen: (B, n, C, R) bool, which of them a token reads.
    """

    token: Tensor
    key: Tensor
    seen: Tensor

    def tokens_of(self, tensor: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
        """(B, L, H, ·) -> (B, n, G, H/G·C, ·) in `dtype`, 0 where none asks."""
        rows = gathered(tensor, self.token).to(dtype).unflatten(3, (groups, -1))
        return rows.permute(0, 1, 3, 4, 2, 5).flatten(3, 4)

    def keys_of(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, M, G, ·) -> (B, n, G, R, ·) in `dtype`, 0 where there is no key."""
        return gathered(tensor, self.key).to(dtype).transpose(2, 3)

    def write_tokens(self, rows: Tensor, tensor: Tensor) -> None:
        """(B, n, G, H/G·C, ·) into (B, L + 1, H, ·), whose last token stands for none."""
        by_head = rows.unflatten(3, (-1, self.token.shape[2])).permute(0, 1, 4, 2, 3, 5).flatten(3, 4)
        place = flat_places(self.token, tensor)
        tensor.flatten(0, 1).index_copy_(0, place, by_head.flatten(0, 2).to(tensor.dtype))

    def add_keys(self, rows: Tensor, tensor: Tensor) -> None:
        """Add (B, n, G, R, ·) to (B, M + 1, G, ·): C keys of every block at once, all of them different."""
        size, flat = self.token.shape[2], tensor.flatten(0, 1)
        for part in (slice(first, first + size) for first in range(0, self.key.shape[2], size)):
            place = flat_places(self.key[:, :, part], tensor)
            found = rows[:, :, :, part].transpose(2, 3).flatten(0, 2)
            flat.index_copy_(0, place, found.add_(flat.index_select(0, place)))


def row_numbers(index: Tensor) -> Tensor:
    """(B, 1, 1): the row of a (B, n, ·) index."""
    return torch.arange(index.shape[0], device=index.device)[:, None, None]


def flat_places(index: Tensor, tensor: Tensor) -> Tensor:
    """Places of (B, n, C) in the rows of (B, length, ...), laid end to end: (B·n·C,)."""
    return (index + row_numbers(index) * tensor.shape[1]).flatten()


def gathered(tensor: Tensor, index: Tensor) -> Tensor:
    """(B, length, ·, ·) at (B, n, C) -> (B, n, C, ·, ·), 0 where the index is `length`."""
    outside = index == tensor.shape[1]
    rows = gather_tokens(tensor, flat_places(index.masked_fill(outside, 0), tensor))
    return rows.view(*index.shape, *tensor.shape[2:]).masked_fill_(outside[..., None, None], 0)


def blocks(inputs: SlidingInputs) -> Iterator[Blocks]:
    """All blocks of (B, M) places, cut into slabs."""
    (batch, length, heads, _), keys, device = inputs.q.shape, inputs.k.shape[1], inputs.q.device
    asks, valid, low, window = inputs.asks, inputs.valid, inputs.low, inputs.window
    order = torch.arange(keys, device=device).expand(batch, keys)
    count = torch.full((batch, 1, 1), keys, device=device)
    if valid is not None:
        order = (~valid).int().argsort(dim=1, stable=True)  # what is there comes first
        count = valid.sum(1)[:, None, None]
    size = min(BLOCK, keys)
    total = -(-keys // size)
    reach = 0 if total == 1 else min(window, keys) - 1  # of one block, all keys are its own
    step = max(1, SLAB_ELEMENTS.get(device.type, 2**20) // max(1, batch * heads * size * (size + reach)))
    for first in range(0, total, step):
        start = torch.arange(first, min(first + step, total), device=device)[:, None] * size  # (n, 1)
        own = (start + torch.arange(size, device=device))[None]  # (1, n, C): as counted among those there
        near = (start + torch.arange(-reach, size, device=device))[None]  # (1, n, R)
        key, place = (places(order, nth, count) for nth in (near, own))
        token = torch.where(place < keys, place - (keys - length), -1)
        token = token.masked_fill(token < 0, length)  # tokens of the state ask nothing
        if asks is not None:
            asking = torch.nn.functional.pad(asks, (0, 1))
            token = token.masked_fill(~asking[row_numbers(token), token], length)
        floor = place - (window - 1)
        if low is not None:
            floor = low[row_numbers(place), place.clamp(max=keys - 1)].long()
        seen = (key[:, :, None] <= place[..., None]) & (key[:, :, None] >= floor[..., None])
        yield Blocks(token, key, seen & (key < keys)[:, :, None] & (token < length)[..., None])


def places(order: Tensor, nth: Tensor, count: Tensor) -> Tensor:
    """(B, n, ·) int64: the places of the nth keys that are there; `keys` where there are fewer."""
    keys = order.shape[1]
    found = order[row_numbers(count), nth.clamp(0, keys - 1)]
    return found.masked_fill((nth < 0) | (nth >= count), keys)


def forward(inputs: SlidingInputs) -> SlidingOutputs:
    """Eq. (1); o and lse are 0 where a token does not ask."""
    q, k, v = inputs[:3]
    (batch, length, heads, _), wide = q.shape, accumulation_dtype(q.dtype)
    o = q.new_zeros(batch, length + 1, heads, v.shape[3])
    lse = q.new_zeros(batch, length + 1, heads, 1, dtype=wide)
    for block in blocks(inputs):
        queries = block.tokens_of(q, k.shape[2], wide)
        scores = masked_scores(queries, block.keys_of(k, wide), block, inputs.scale)
        log_sum = scores.logsumexp(-1, keepdim=True)
        log_sum = log_sum.masked_fill(log_sum == -torch.inf, 0)  # of tokens that do not ask
        block.write_tokens(scores.sub_(log_sum).exp_() @ block.keys_of(v, wide), o)
        block.write_tokens(log_sum, lse)
    return SlidingOutputs(o[:, :length].contiguous(), lse[:, :length, :, 0].transpose(1, 2).contiguous())


def backward(inputs: SlidingInputs, outputs: SlidingOutputs, grads: SlidingOutputs) -> SlidingGrads:
    """Eq. (2): the gradients of q, k and v, at least float32."""
    q, k, v = inputs[:3]
    (batch, length, *_), wide, groups = q.shape, accumulation_dtype(q.dtype), k.shape[2]
    q_grad = q.new_zeros(batch, length + 1, *q.shape[2:], dtype=wide)
    k_grad, v_grad = (t.new_zeros(batch, t.shape[1] + 1, *t.shape[2:], dtype=wide) for t in (k, v))
    lse = outputs.lse.transpose(1, 2)[..., None]
    for block in blocks(inputs):
        queries, grad, log_sum = (block.tokens_of(t, groups, wide) for t in (q, grads.o, lse))
        keys, values = block.keys_of(k, wide), block.keys_of(v, wide)
        weights = masked_scores(queries, keys, block, inputs.scale).sub_(log_sum).exp_()
        weights_grad = grad @ values.mT
        delta = (weights * weights_grad).sum(-1, keepdim=True)
        scores_grad = weights * (weights_grad - delta) * inputs.scale
        block.write_tokens(scores_grad @ keys, q_grad)
        block.add_keys(scores_grad.mT @ queries, k_grad)  # a group's heads are rows of one product
        block.add_keys(weights.mT @ grad, v_grad)
    return SlidingGrads(q_grad[:, :length], k_grad[:, :-1], v_grad[:, :-1])


def masked_scores(queries: Tensor, keys: Tensor, block: Blocks, scale: float) -> Tensor:
    """scale q·k, (B, n, G, H/G·C, R); -inf where a token does not read a key."""
    scores = (queries @ keys.mT).mul_(scale)
    by_head = scores.unflatten(3, (-1, block.token.shape[2]))
    return by_head.masked_fill_(~block.seen[:, :, None, None], -torch.inf).flatten(3, 4)


def step(inputs: StepInputs) -> StepOutputs:
    """One token a row against the state and itself."""
    q, k, v, state_k, state_v, present, asks, valid, scale, _ = inputs
    wide, groups = accumulation_dtype(q.dtype), k.shape[1]
    taken = torch.ones_like(present[:, :1]) if valid is None else valid[:, None]
    asking = taken[:, 0] if asks is None else asks & taken[:, 0]
    there = torch.cat([present, taken], dim=1)  # (B, W)
    keys, values = (
        torch.cat([state, new[:, None]], dim=1).masked_fill(~there[..., None, None], 0)
        for state, new in ((state_k, k), (state_v, v))
    )  # (B, W, G, ·)
    queries = q.masked_fill(~asking[:, None, None], 0).to(wide).unflatten(1, (groups, -1))  # (B, G, H/G, N)
    scores = (queries @ keys.to(wide).permute(0, 2, 3, 1)).mul_(scale)  # (B, G, H/G, W)
    scores.masked_fill_(~there[:, None, None], torch.finfo(wide).min)
    o = (scores.softmax(-1) @ values.to(wide).transpose(1, 2)).flatten(1, 2)  # (B, H, P)
    state_k[:] = torch.where(taken[..., None, None], keys[:, 1:], keys[:, :-1])
    state_v[:] = torch.where(taken[..., None, None], values[:, 1:], values[:, :-1])
    new_present = torch.where(taken, there[:, 1:], there[:, :-1])
    return StepOutputs(o.masked_fill(~asking[:, None, None], 0).to(q.dtype), new_present)


def ring(inputs: RingInputs) -> Tensor:
    """`step` on copies of the rows in their order; the token's key and value take their place."""
    q, k, v, cos, sin, ring_k, ring_v, present, rows, turn, valid, scale, _, logit, out = inputs
    angles = cos[:, None], sin[:, None]
    q, k = (rotate(RotateInputs(each[:, None], *angles))[:, 0] for each in (q, k))
    at = rows[:, None], ring_slots(turn, ring_k.shape[1])
    o, _ = step(StepInputs(q, k, v, ring_k[at], ring_v[at], present[at] != 0, None, valid, scale))
    own = rows, turn % ring_k.shape[1]
    for pool, new in ((ring_k, k), (ring_v, v), (present, present.new_ones(len(rows)))):
        kept = new if valid is None else torch.where(valid.view(-1, *[1] * (new.ndim - 1)), new, pool[own])
        pool[own] = kept.to(pool.dtype)
    if logit is not None:  # a row at rest may have any
        o = torch.where(o == 0, o, o * torch.sigmoid(-logit)[..., None]).to(o.dtype)
    return o if out is None else out.copy_(o.flatten(1)).new_empty(0)
